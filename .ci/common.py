"""What the check scripts share: where the project lies, a copy to work on, and the count of what ran."""
import os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNTRACKED = ('.git', '.venv', '_proc', '_docs', 'build', 'dist', '*.egg-info', '__pycache__', '.ipynb_checkpoints', '.quarto', 'miram-demo',
             'nbdev.yml', 'sidebar.yml')

# What a script starts finds compiled modules, also where the machine keeps Python from writing them beside the sources
os.environ['PYTHONPYCACHEPREFIX'] = str(Path(sys.prefix)/'bytecode')
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

def copy_tree(dest):
    "Copy the project's own files to the new folder `dest`, where a check may write"
    shutil.copytree(ROOT, dest, symlinks=True, ignore=shutil.ignore_patterns(*UNTRACKED))
    return Path(dest)

def run(*cmd, cwd=ROOT, **kw):
    "Run `cmd` and return what it printed; a `RuntimeError` with the end of that when it fails"
    env = dict(os.environ, **kw.pop('env', {}))
    p = subprocess.run([str(o) for o in cmd], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       stdin=subprocess.DEVNULL, **kw)
    if p.returncode: raise RuntimeError(f'{" ".join(map(str, cmd))} ended with status {p.returncode}:\n{p.stdout[-6000:]}')
    return p.stdout

def tally(passed, failed, skipped=0):
    "Add to the counts that `.ci/run` sums up, when it is what started us"
    if f := os.environ.get('MIRAM_TALLY'):
        with open(f, 'a') as o: o.write(f'{passed} {failed} {skipped}\n')
