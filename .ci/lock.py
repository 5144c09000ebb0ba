"""Write constraints.txt: the newest versions that settings.ini admits, for every Python from the oldest supported on."""
import os, sys
from pathlib import Path

from common import ROOT, run

HEAD = '''# Exact versions of the development set, as tested; settings.ini holds the ranges that users get.
# Written by `make lock`, which resolves settings.ini for every Python from 3.10 on.
'''

if __name__ == '__main__':
    uv = Path(sys.executable).parent/'uv'
    out = ROOT/'constraints.txt'
    tmp = out.with_suffix('.tmp')
    run(uv, 'pip', 'compile', '--quiet', '--universal', '--python-version', '3.10', '--extra', 'dev', '--upgrade',
        '--no-annotate', '--no-header', 'setup.py', '-o', tmp)
    new = HEAD + tmp.read_text()
    tmp.write_text(new)
    os.replace(tmp, out)
    print(f'{out.name}: {len(new.splitlines()) - 2} versions')
