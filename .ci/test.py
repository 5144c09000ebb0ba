"""Test every notebook with nbdev's `test_nb`, each in a process of its own; what `nbdev_test` does, saying more while it runs.

    python .ci/test.py [--flags "slow real"] [--workers 2] [NOTEBOOK …]

The notebooks that took longest last time start first. With `MIRAM_CBIS` set to a CBIS-DDSM folder the cells flagged `real` run too.
"""
import argparse, json, os, sys, tempfile, time
from importlib import import_module
from multiprocessing import Process
from multiprocessing.connection import wait
from pathlib import Path

from common import ROOT, tally

# What most notebooks import, and nothing of miram: importing starts no threads, so a fork of this process is a fresh one
PRELOAD = ('nbdev.test', 'torch', 'torchvision', 'timm', 'fastai.learner', 'fastai.callback.all', 'fastai.data.all', 'fastai.distributed',
           'matplotlib', 'pandas', 'scipy.stats', 'sklearn.linear_model', 'pydicom', 'huggingface_hub', 'accelerate')

def find(names=()):
    "The notebooks that `nbdev_test` would test, or those in `names`"
    from nbdev.doclinks import nbglob
    if names: return [Path(o).resolve() for o in names]
    return sorted(f.absolute() for f in nbglob(ROOT/'nbs', as_path=True) if not (f.parent/'.notest').exists())

def one(path, skip, force, log):
    "Test one notebook in this process: what it prints goes to the file `log`, the exit status says how it went"
    f = os.open(log, os.O_WRONLY)
    for fd in (1, 2): os.dup2(f, fd)
    from nbdev.test import test_nb
    ok, _ = test_nb(path, skip_flags=skip, force_flags=force, basepath=ROOT)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(not ok)

class Times:
    "Seconds each notebook took last time, kept beside the environment"
    def __init__(self): self.path = Path(sys.prefix)/'notebook-seconds.json'
    def load(self):
        try: return json.loads(self.path.read_text())
        except (OSError, ValueError): return {}
    def save(self, new):
        try: self.path.write_text(json.dumps({**self.load(), **new}, indent=1, sort_keys=True))
        except OSError: pass

def run_all(files, skip, force, workers, limit, tmp):
    "Yield `(notebook, seconds, what went wrong or None)` as the notebooks end"
    files, running = list(files), {}
    while files or running:
        while files and len(running) < workers:
            f = files.pop(0)
            log = Path(tmp)/f'{len(files)}.log'
            log.touch()
            p = Process(target=one, args=(f, skip, force, log))
            p.start()
            running[p.sentinel] = p, f, log, time.time()
        wait(running, timeout=1)
        for s, (p, f, log, start) in list(running.items()):
            secs, why = time.time() - start, None
            if p.exitcode is None and secs < limit: continue
            if p.exitcode is None: p.kill(); why = f'stopped after {limit} s'
            elif p.exitcode < 0: why = f'ended by signal {-p.exitcode}'
            elif p.exitcode: why = f'exit status {p.exitcode}'
            p.join()
            del running[s]
            yield f, secs, why and f'{log.read_text(errors="replace")}\n{why}'

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('notebooks', nargs='*')
    ap.add_argument('--flags', default='', help='flagged cells to run too, space separated')
    ap.add_argument('--workers', type=int, default=2)
    ap.add_argument('--limit', type=int, default=900, help='seconds after which a notebook is stopped')
    a = ap.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//a.workers)))
    from nbdev.config import get_config
    for o in PRELOAD: import_module(o)  # once here, not once a notebook where processes are forked
    force = set(a.flags.split()) | ({'real'} if os.environ.get('MIRAM_CBIS') else set())
    files, times = find(a.notebooks), Times()
    if not files: sys.exit(f'no notebook found below {ROOT/"nbs"}')
    last = times.load()
    names = {f: os.path.relpath(f, ROOT) for f in files}
    files.sort(key=lambda f: (-last.get(names[f], float('inf')), -f.stat().st_size))
    also = f', with the cells flagged {" ".join(sorted(force))}' if force else ''
    print(f'testing {len(files)} notebooks, {a.workers} at a time{also}', flush=True)
    start, new, failed = time.time(), {}, []
    with tempfile.TemporaryDirectory() as tmp:
        for f, secs, err in run_all(files, get_config(path=ROOT).tst_flags.split(), list(force), a.workers, a.limit, tmp):
            print(f'{"FAILED" if err else "ok":6} {secs:6.1f} s  {names[f]}', flush=True)
            if err: failed.append(names[f]); print(err, flush=True)
            else: new[names[f]] = round(secs, 1)
    times.save(new)
    if failed: print('failed: ' + ', '.join(failed))
    print(f'notebooks: {len(files) - len(failed)} passed, {len(failed)} failed in {time.time() - start:.0f} s')
    tally(len(files) - len(failed), len(failed))
    return bool(failed)

if __name__ == '__main__': sys.exit(main())
