"""Break the attentions on purpose, one line at a time, and see whether a cell of the owning notebook notices.

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

NBS = dict(base='10_base', linformer='11_linformer', performer='12_performer', nystrom='13_nystrom', memory='03_memory', checks='15_checks')
UNCHANGED = 'unchanged'

MUTATIONS = dict(  # name → module, piece of its source, what stands there instead
    drop_the_scale=('base', 'q@k.mT*self.d**-.5', 'q@k.mT'),
    transpose_heads=('base', 't.transpose(1, 2).flatten(2)', 't.permute(0, 2, 3, 1).flatten(2)'),
    cut_heads_the_other_way=('base', 't.unflatten(-1, (heads,-1)).transpose(1, 2)', 't.unflatten(-1, (-1,heads)).permute(0, 3, 1, 2)'),
    swap_keys_and_values=('base', 'tuple(split_heads(t, heads) for p in packed for t in p.split(dim, dim=-1))',
                          'tuple([split_heads(t, heads) for p in packed for t in p.split(dim, dim=-1)][i] for i in (0,2,1))'),
    pool_without_normalising=('base', 'w.clamp(min=0)*m/n', 'w.clamp(min=0)'),
    average_the_prefix_away=('base', 'torch.block_diag(torch.eye(n_prefix, dtype=p.dtype), p) if n_prefix',
                             'F.pad(p, (n_prefix,0)) if n_prefix'),
    count_views_as_storages=('memory', 'self.kept[storage] = t', 'self.kept[len(self.kept)] = t'),
    count_the_parameters=('memory', 'if storage not in self.skip: self.kept', 'self.kept'),
    check_without_batch_mates=('checks', 'torch.cat([t[:1], 20*t[1:]]) if t.is_floating_point() else t', 't'),
    values_by_the_keys_averages=('linformer', 'es[i%len(es)]', 'es[0]'),
    accept_fewer_tokens=('linformer', 'if ids is None and n!=self.seq_len', 'if ids is None and n>self.seq_len'),
    resize_changes_the_sums=('linformer', 'torch.kron(rows, cols)))', 'torch.kron(rows, cols))*n/self.seq_len)'),
    always_project_first=('linformer', 'F.linear(e@x, w) if average_first else', ''),
    forget_the_key_norm=('performer', '(kf.square().sum(-1, keepdim=True)*-half)', '(kf.square().sum(-1, keepdim=True)*0)'),
    forget_the_centre=('performer', 'wk + a*a*kc + s*s*qc', 'wk'),
    shrink_by_a_constant=('performer', 'ctx.eps,ctx.how = shrink/len(w),how', 'ctx.eps,ctx.how = shrink,how'),
    shrink_by_a_constant_in_favor=('performer', 'alone), shrink/len(w))', 'alone), shrink)'),
    gradient_without_denominator=('performer', '-(g*o).sum(-1, keepdim=True)', '0*(g*o).sum(-1, keepdim=True)'),
    gradient_without_key_norm=('performer', '-2*half*r', '0*half*r'),
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
)

def preload():
    "Import what the notebooks need, but nothing of miram: each mutation is tried in a fork of this process"
    warnings.simplefilter('ignore')
    os.environ['MPLBACKEND'] = 'agg'
    for o in ('fastcore.test', 'matplotlib.pyplot', 'torch.utils.flop_counter', 'linformer', 'nystrom_attention',
              'performer_pytorch.performer_pytorch'): import_module(o)
    import_module('torch').set_num_threads(1)

def mutated(name, dest):
    "Copy the package to `dest` with the mutation in it; a `SystemExit` when the piece to replace is not there exactly once"
    shutil.copytree(ROOT/'miram', dest/'miram', ignore=shutil.ignore_patterns(*UNTRACKED))
    if name==UNCHANGED: return
    mod,old,new = MUTATIONS[name]
    f = dest/'miram'/(f'{mod}.py' if mod=='memory' else f'attention/{mod}.py')
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
    mod = import_module('miram.memory' if name=='memory' else f'miram.attention.{name}')
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
