"""Build the documentation site without Quarto: nbdev processes a copy of the notebooks, smalldocs renders them.

    python .ci/docs.py [--work DIR] [--out _docs]

`--work` keeps the copy (its `_proc` is the site's source, `_proc/_docs` the site), `--out` receives the finished site.
"""
import argparse, json, os, re, shutil, sys, tempfile
from pathlib import Path

from common import copy_tree, run

def process(tree):
    "In the project copied to `tree`, run what the pages show of the code and write them to `_proc`; nbdev reads the folder it stands in"
    os.chdir(tree)
    from nbdev import serve_drv
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    wrong, process_one = [], serve_drv.main
    def keep_on(o):
        try: process_one(o)
        except Exception as e: wrong.append(f'{o[0].name}: {e}\n{e.__cause__!r}')
    serve_drv.main = keep_on
    proc_nbs(force=True, n_workers=0)
    if wrong: sys.exit('\n'.join(['these notebooks could not be processed:'] + wrong))
    cfg = get_config()
    rename(cfg.config_path/'_proc', cfg.doc_host + cfg.doc_baseurl)

def output_file(nb):
    "The page name that nbdev put into the front matter of `nb`, taken out of it: Quarto reads that key, smalldocs does not"
    for c in nb['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'raw' and (m := re.search(r'^output-file: (\S+)\.html\n', src, re.M)):
            c['source'] = src.replace(m[0], '')
            return m[1]

def rename(proc, site):
    "Name the pages in `proc` as Quarto would (`patches` for `00_patches.ipynb`); links to `site` become relative, so they can be checked"
    pages = {f: json.loads(f.read_text()) for f in sorted(proc.rglob('*.ipynb'))}
    names = {f.name: n + '.ipynb' for f, nb in pages.items() if (n := output_file(nb))}
    old = re.compile(r'(?<![\w.-])(' + '|'.join(map(re.escape, names)) + r')(?![\w.-])')
    def relink(text, folder):
        text = old.sub(lambda m: names[m[1]], text)
        return re.sub(re.escape(site) + r'/([\w./-]+\.html)', lambda m: os.path.relpath(proc/m[1], folder), text)
    for f, nb in pages.items():
        f.unlink()
        (f.parent/names.get(f.name, f.name)).write_text(relink(json.dumps(nb, ensure_ascii=False), f.parent))
    bar = proc/'sidebar.yml'
    bar.write_text(relink(bar.read_text(), proc))

def build(tree):
    "Copy the project to the new folder `tree` and build its site there"
    copy_tree(tree)
    run(sys.executable, __file__, '--process', tree, env={'PYTHONPATH': str(tree)})
    return run(sys.executable, '-m', 'smalldocs.cli', 'render', tree/'_proc')

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--work', type=Path, help='new folder to build in')
    ap.add_argument('--out', type=Path, help='folder for the finished site')
    ap.add_argument('--process', type=Path, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.process: return process(a.process)
    with tempfile.TemporaryDirectory() as tmp:
        tree = (a.work or Path(tmp)/'miram').resolve()
        print(build(tree), end='')
        if a.out:
            shutil.rmtree(a.out, ignore_errors=True)
            shutil.copytree(tree/'_proc'/'_docs', a.out)
            print(f'the site is in {a.out}')

if __name__ == '__main__': main()
