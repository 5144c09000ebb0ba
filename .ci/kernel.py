"""Run notebooks top to bottom in a real Jupyter kernel, as a reader in JupyterLab does; `--store` keeps what they print.

    python .ci/kernel.py [--store] [--flags "real slow"] [NOTEBOOK …]

Cells flagged with a word of `tst_flags` run only when that flag is given; when they are passed over, their stored output stays.
"""
import argparse, os, re, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config

from common import ROOT, tally

def directives(src):
    "First words of the `#|` lines that open a cell"
    return {m[1]: m[2].strip() for m in re.finditer(r'^#\s*\|\s*([\w-]+):?[ \t]*(.*)$', src, re.M)}

def skipped(cell, flags):
    "Whether `cell` is not to be run when the cells flagged `flags` are to be passed over"
    d = directives(cell.source)
    return cell.cell_type != 'code' or 'nbdev_export(' in cell.source or d.get('eval') == 'false' or bool(flags & d.keys())

def clean(outputs):
    "Outputs worth keeping: no execution counts, no stderr, no progress bars, no memory addresses, adjacent text joined"
    kept = []
    for o in outputs:
        if o.output_type == 'stream' and o.name == 'stderr': continue
        if o.output_type == 'display_data' and 'application/vnd.jupyter.widget-view+json' in o.data: continue
        if 'execution_count' in o: o.execution_count = None
        if 'metadata' in o: o.metadata = {}
        if o.output_type == 'stream': o.text = re.sub(r' at 0x[0-9a-f]+', '', o.text)
        elif 'text/plain' in o.get('data', {}): o.data['text/plain'] = re.sub(r' at 0x[0-9a-f]+', '', o.data['text/plain'])
        if kept and o.output_type == 'stream' == kept[-1].output_type: kept[-1].text += o.text
        else: kept.append(o)
    return kept

def run(path, force, store, tries=3):
    "Execute one notebook; the error as text, or None. Two kernels that start at once may take one port: the one that dies starts again"
    err, secs = execute(path, force, store)
    return run(path, force, store, tries - 1) if tries > 1 and err and err.startswith('Kernel died before replying') else (err, secs)

def execute(path, force, store):
    "`run`, once"
    nb = nbformat.read(path, as_version=4)
    if any(re.search(r'^skip_exec:\s*true', c.source, re.M) for c in nb.cells if c.cell_type == 'raw'): return None, 0.
    flags = set(get_config(path=ROOT).tst_flags.split()) - set(force)
    start, err = time.time(), None
    client = NotebookClient(nb, timeout=1800, kernel_name='python3', extra_arguments=['--IPKernelApp.log_level=ERROR'],
                            resources={'metadata': {'path': str(path.parent)}})
    try:
        with client.setup_kernel():
            for i, c in enumerate(nb.cells):
                if skipped(c, flags): continue
                client.execute_cell(c, i)
                c.outputs, c.execution_count = clean(c.outputs), None
                c.metadata.pop('execution', None)
    except Exception as e: err = str(e) or repr(e)  # a failing cell, a cell that takes too long, a kernel that died
    if store and err is None:
        nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
        tmp = path.with_suffix('.tmp')
        tmp.write_text(nbformat.writes(nb) + '\n', encoding='utf-8')
        os.replace(tmp, path)
    return err, time.time() - start

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('notebooks', nargs='*', type=Path)
    ap.add_argument('--store', action='store_true', help='write the outputs into the notebooks')
    ap.add_argument('--flags', default='', help='flagged cells to run too, space separated')
    ap.add_argument('--workers', type=int, default=2)
    a = ap.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//a.workers)))
    files = [f.resolve() for f in a.notebooks] or sorted(
        f for f in (ROOT/'nbs').rglob('*.ipynb') if not any(p.startswith(('.', '_')) for p in f.relative_to(ROOT).parts))
    if not files: sys.exit(f'no notebook found below {ROOT/"nbs"}')
    failed = 0
    with ProcessPoolExecutor(a.workers) as ex:
        jobs = {ex.submit(run, f, a.flags.split(), a.store): f for f in sorted(files, key=lambda f: -f.stat().st_size)}
        for job in as_completed(jobs):
            err, s = job.result()
            print(f'{"FAILED" if err else "ok":6} {s:6.1f} s  {os.path.relpath(jobs[job], ROOT)}', flush=True)
            if err: failed += 1; print(err, flush=True)
    print(f'in a Jupyter kernel: {len(files) - failed} passed, {failed} failed')
    tally(len(files) - failed, failed)
    return bool(failed)

if __name__ == '__main__': sys.exit(main())
