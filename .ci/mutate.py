"""Break the attentions and the cross decoder on purpose, one line at a time, and see whether a cell of the owning notebook notices.

    python .ci/mutate.py [--list] [NAME …]

Every mutation replaces one piece of an exported module in a copy of the package; then the notebook's cells run against the copy until one
fails. A mutation that no cell notices survives, and that is a failure. First each notebook runs on an unchanged copy, which has to survive:
otherwise the cells fail by themselves and prove nothing.
"""
import argparse, json, os, re, shutil, sys, tempfile, time, warnings
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from common import ROOT, UNTRACKED, tally

NBS = dict(base='10_base', linformer='11_linformer', performer='12_performer', nystrom='13_nystrom', memory='03_memory', checks='15_checks',
           cross='23_cross')
PACKAGES = dict(memory='', cross='models.') # where a module is that is not among the attentions
UNCHANGED = 'unchanged'

MUTATIONS = dict(  # name → module, piece of its source, what stands there instead
    drop_the_scale=('base', 'q@k.mT*self.d**-.5', 'q@k.mT'),
    transpose_heads=('base', 't.transpose(1, 2).flatten(2)', 't.permute(0, 2, 3, 1).flatten(2)'),
    cut_heads_the_other_way=('base', 't.unflatten(-1, (heads,-1)).transpose(1, 2)', 't.unflatten(-1, (-1,heads)).permute(0, 3, 1, 2)'),
    swap_keys_and_values=('base', 'tuple(split_heads(t, heads) for p in packed for t in p.split(dim, dim=-1))',
                          'tuple([split_heads(t, heads) for p in packed for t in p.split(dim, dim=-1)][i] for i in (0,2,1))'),
    queries_by_the_last_third=('base', 't.split([self.dim, 2*self.dim])', 't.split([2*self.dim, self.dim])[::-1]'),
    pool_without_normalising=('base', 'w.clamp(min=0)*m/n', 'w.clamp(min=0)'),
    average_the_prefix_away=('base', 'torch.block_diag(torch.eye(n_prefix, dtype=p.dtype), p) if n_prefix',
                             'F.pad(p, (n_prefix,0)) if n_prefix'),
    count_views_as_storages=('memory', 'self.kept[storage] = t', 'self.kept[len(self.kept)] = t'),
    count_the_parameters=('memory', 'if storage not in self.skip: self.kept', 'self.kept'),
    check_without_batch_mates=('checks', 'torch.cat([t[:1], 20*t[1:]]) if t.is_floating_point() else t', 't'),
    compare_queries_with_themselves=('checks', 'assert_close(got, y[:,some]', 'assert_close(got, got'),
    others_no_louder=('checks', 'louder[:,1::2] *= 20', 'louder[:,1::2] *= 1'),
    leave_the_context_in_order=('checks', 'context[:,p:].flip(1)', 'context[:,p:]'),
    turn_the_context_without_its_ids=('checks', ',ids.flip(1)', ',ids'),
    values_by_the_keys_averages=('linformer', 'es[i%len(es)]', 'es[0]'),
    accept_fewer_tokens=('linformer', 'if ids is None and n!=self.seq_len', 'if ids is None and n>self.seq_len'),
    resize_changes_the_sums=('linformer', 'torch.kron(rows, cols)))', 'torch.kron(rows, cols))*n/self.seq_len)'),
    always_project_first=('linformer', 'F.linear(e@x, w) if average_first else', ''),
    forget_how_many_are_shown=('linformer', 'count.log()[:,None,None]', '0*count[:,None,None]'),
    prefix_as_much_as_a_cell=('linformer', 'share*(self.rows.shape[1]*cols/share.shape[1])', 'share'),
    shown_part_of_an_average=('linformer', '(1/share.where(share>0, 1)-1)', '(0*share)'),
    first_columns_for_those_shown=('linformer', 'F.embedding(at, e.T)+more', 'e.T[:at.shape[1]]+more'),
    start_by_the_first_columns=('linformer', 'F.embedding(ids%cols, self.cols.T)', 'F.embedding(ids*0, self.cols.T)'),
    forget_the_key_norm=('performer', '(kf.square().sum(-1, keepdim=True)*-half)', '(kf.square().sum(-1, keepdim=True)*0)'),
    forget_the_centre=('performer', 'wk + a*a*kc + s*s*qc', 'wk'),
    shrink_by_a_constant=('performer', 'ctx.eps,ctx.how = shrink/len(w),how', 'ctx.eps,ctx.how = shrink,how'),
    shrink_by_a_constant_in_favor=('performer', 'alone), shrink/len(w))', 'alone), shrink)'),
    gradient_without_denominator=('performer', '-(g*o).sum(-1, keepdim=True)', '0*(g*o).sum(-1, keepdim=True)'),
    gradient_without_key_norm=('performer', '-2*half*r', '0*half*r'),
    forget_the_key_norm_by_hand=('performer', 'sub_((half*k.square()', 'sub_((0*k.square()'),
    no_gradient_by_the_query_maximum=('performer', '_to_largest(lq, fq, -lq.sum(-1, keepdim=True))', 'pass'),
    no_gradient_by_the_key_maximum=('performer', '_to_largest(lk, fk, lq.sum(-2).unsqueeze(-1) - lk.sum(-1, keepdim=True))', 'pass'),
    key_maximum_for_the_keys_alone=('performer', 'lq.sum(-2).unsqueeze(-1) - lk.sum', '-lk.sum'),
    each_of_the_largest_gets_all=('performer', 'l.addcmul_(top, g/top.sum(-1, keepdim=True))', 'l.addcmul_(top, g)'),
    no_gradient_by_the_balance=('performer', 'if how[0]: _balance_grad', 'if False: _balance_grad'),
    no_gradient_by_the_lengths=('performer', 'gx.addcmul_(x, part).sub_(c*part)', 'pass'),
    gradient_as_if_queries_were_balanced=('performer', 'if alone: return gk.add_', 'if False: return gk.add_'),
    balance_by_the_queries_of_a_context=('performer', 'alone=context is not None', 'alone=False'),
    one_set_of_features_for_all=('performer', 'int(torch.randint(2**31, (), device=\'cpu\')) if seed is None', '0 if seed is None'),
    redraw_the_same=('performer', 'self.draws[1] += 1', 'self.draws[1] += 0'),
    pinv_start_over_the_batch=('nystrom', 'a.abs().sum(-1).amax(-1)*a.abs().sum(-2).amax(-1))[...,None,None]',
                               'a.abs().sum(-1).amax()*a.abs().sum(-2).amax())'),
    forget_the_residual=('nystrom', 'merge_heads(o) + merge_heads(conv(v, w))', 'merge_heads(o) + 0*merge_heads(conv(v, w))'),
    drop_the_landmarks_scale=('nystrom', 'ql@kl_.mT*q.shape[-1]**-.5', 'ql@kl_.mT'),
    transpose_the_landmarks=('nystrom', 'ql@kl_.mT*q', 'kl_@ql.mT*q'),
    textbook_gradient=('nystrom', '(w-a@u)@r.mT - gw@u.mT', '-gw@u.mT'),
    residual_on_the_prefix=('nystrom', 'F.pad(out, (0,0,n_prefix,0))', 'F.pad(out, (0,0,0,n_prefix))'),
    segments_in_place_of_cells=('nystrom', "self.grid if self.pool=='grid' else None", 'None'),
    inverse_in_half_precision=('nystrom', 't.to(torch.promote_types(t.dtype, torch.float32))', 't'),
    project_the_mixed_values_alone=('nystrom', 'T@x.detach().flatten(0, 1)', 'T@merge_heads(o).flatten(0, 1)'),
    inverse_off_the_diagonal=('nystrom', 'torch.cat([-f.mT, ci], -1)', 'torch.cat([f.mT, ci], -1)'),
    key_positions_without_the_scale=('cross', 'self.n_prefix, self.scale)', 'self.n_prefix)'),
    key_positions_by_rank=('cross', 'self.pos_context[0,p:][keep]', 'self.pos_context[:,p:p+keep.shape[1]].expand(len(keep), -1, -1)'),
    context_without_its_norm=('cross', 'self.norm_context(zs[0]+where)', 'zs[0]+where'),
    mixture_without_its_norm=('cross', 'self.norm_context(sum(a*z for a,z in zip(w, zs))+where)', 'sum(a*z for a,z in zip(w, zs))+where'),
    layers_without_their_weights=('cross', 'sum(a*z for a,z in zip(w, zs))', 'sum(zs)'),
    weights_of_the_other_layers=('cross', 'zip(w, zs)', 'zip(w, zs[::-1])'),
    ask_for_the_first_patches=('cross', 'self.pos[0][ids])', 'self.pos[:,:ids.shape[1]].expand(len(keep), -1, -1))'),
)

def preload():
    "Import what the notebooks need, but nothing of miram: each mutation is tried in a fork of this process"
    warnings.simplefilter('ignore')
    os.environ['MPLBACKEND'] = 'agg'
    for o in ('fastcore.test', 'matplotlib.pyplot', 'torch.utils.flop_counter', 'timm', 'linformer', 'nystrom_attention',
              'performer_pytorch.performer_pytorch'): import_module(o)
    import_module('torch').set_num_threads(1)

def module(name):
    "`name` with the package that it is in"
    return PACKAGES.get(name, 'attention.')+name

def mutated(name, dest):
    "Copy the package to `dest` with the mutation in it; a `SystemExit` when the piece to replace is not there exactly once"
    shutil.copytree(ROOT/'miram', dest/'miram', ignore=shutil.ignore_patterns(*UNTRACKED))
    if name==UNCHANGED: return
    mod,old,new = MUTATIONS[name]
    f = dest/'miram'/f'{module(mod).replace(".", "/")}.py'
    text = f.read_text(encoding='utf-8')
    if text.count(old)!=1:
        sys.exit(f'{name}: {text.count(old)} places in {f.relative_to(dest)} read {old!r}, not one: bring .ci/mutate.py up to date')
    f.write_text(text.replace(old, new), encoding='utf-8')

def cells(notebook):
    "`(id, source)` of the cells that every test run executes"
    for c in json.loads(next((ROOT/'nbs').rglob(f'{notebook}.ipynb')).read_text(encoding='utf-8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type']!='code' or 'nbdev_export()' in src or re.search(r'^#\s*\|\s*(slow|cuda|real|eval: *false)', src, re.M): continue
        if not re.search(r'^#\s*\|\s*export', src, re.M) or re.search(r'^(import|from) ', src, re.M): yield c['id'],src
        else: yield c['id'],'\n'.join(export_imports(src))

def export_imports(src):
    "An exported cell as the imports of its names from the module under test, so that the notebook runs on the copy and not on itself"
    names = re.findall(r'^(?:def|class) (\w+)', src, re.M) + re.findall(r'^(\w+)(?:,\w+)* *=', src, re.M)
    patches = re.search(r'^@patch', src, re.M)
    return [f'{n} = __module__.{n}' for n in names if not patches]

def attempt(name, notebook, folder, out):
    "In a process of its own: run the notebook on the copy in `folder`, and say on the pipe `out` which cell failed, and how"
    sys.path.insert(0, str(folder))
    os.chdir(ROOT/'nbs')
    name = notebook.split('_', 1)[1]
    mod = import_module(f'miram.{module(name)}')
    assert str(folder) in mod.__file__, mod.__file__
    scope,silent = {'__name__': '__main__', '__module__': mod},open(os.devnull, 'w')
    sys.stdout = sys.stderr = silent
    for i,src in cells(notebook):
        try: exec(compile(src, i, 'exec'), scope)
        except BaseException as e:
            out.send((i, f'{type(e).__name__}: {" ".join(str(e).split())[:90]}'))
            break
    else: out.send(None)
    os._exit(0)

def tried(name, notebook, ctx):
    "`(cell, error)` that noticed the mutation, or None when it survived"
    with tempfile.TemporaryDirectory(prefix='miram-mutate-') as tmp:
        mutated(name, Path(tmp))
        here,there = ctx.Pipe(duplex=False)
        p = ctx.Process(target=attempt, args=(name, notebook, Path(tmp), there))
        p.start()
        there.close()
        try: return here.recv()
        except EOFError: sys.exit(f'{name}: the process died before a cell ran; a mutation has to leave valid Python')
        finally: p.join()

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('names', nargs='*', metavar='NAME', help=f'mutations to try, all by default; {UNCHANGED!r} tries none and survives')
    ap.add_argument('--list', action='store_true', help='list the mutations')
    a = ap.parse_args()
    if a.list: return print('\n'.join(f'{n:32} {m}: {o!r} → {w!r}' for n,(m,o,w) in MUTATIONS.items()))
    if wrong := set(a.names) - MUTATIONS.keys() - {UNCHANGED}: sys.exit(f'no such mutation: {", ".join(sorted(wrong))}; --list shows them')
    start,ctx,names = time.time(),get_context('fork'),a.names or list(MUTATIONS)
    preload()
    mods = dict.fromkeys(MUTATIONS[n][0] for n in names if n!=UNCHANGED)
    broken = {m: r for m in mods if (r := tried(UNCHANGED, NBS[m], ctx))}
    for m,(i,e) in broken.items(): print(f'FAILED  {NBS[m]} does not pass as it is: cell {i}: {e}', flush=True)
    survived = []
    for n in names:
        r = tried(n, NBS[MUTATIONS[n][0]] if n in MUTATIONS else NBS['base'], ctx)
        if r is None: survived.append(n)
        print(f'{"noticed" if r else "SURVIVED":9} {n}' + (f': cell {r[0]}: {r[1]}' if r else ''), flush=True)
    print(f'mutations: {len(names) - len(survived)} noticed, {len(survived)} survived, in {time.time() - start:.0f} s')
    tally(len(names) - len(survived), len(survived) + len(broken))
    return bool(survived or broken)

if __name__ == '__main__': sys.exit(main())
