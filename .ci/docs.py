"""Build the documentation site: nbdev processes a copy of the notebooks, and smalldocs renders them, or Quarto where it is installed.

    python .ci/docs.py [--quarto] [--work DIR] [--out _docs]

`--work` keeps the copy (its `_proc` is the site's source, `_proc/_docs` the site), `--out` receives the finished site.
"""
import argparse, html, json, os, re, shutil, sys, tempfile, unicodedata
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from common import copy_tree, run
from pages import nbdev_parts

# The sidebar: part → patterns of notebooks, in this order; where several fit, the longest counts
PARTS = {'Start': ('index', '99_*', 'explanations/*'),
         'Tutorials': ('tutorials/*',),
         'The model': ('00_*', '01_*', 'attention/*', 'models/*', 'explanations/two_scales'),
         'Data': ('data/*', 'external/*', '98_*', 'explanations/broken_inputs'),
         'Training': ('train/*', '0[2-9]_*'),
         'Judging': ('evaluate/*', 'study/*'),
         'Looking': ('viz/*',),
         'Costs': ('cost/*', 'explanations/*_cost'),
         'Commands': ('cli/*',)}

def sidebar(nbs):
    "Quarto's sidebar of the notebooks below `nbs`, by part; a notebook that is in no part is an error"
    parts, lost = {o: [] for o in PARTS}, []
    for f in sorted(nbs.rglob('*.ipynb')):
        name = f.relative_to(nbs).with_suffix('').as_posix()
        if re.search(r'(^|/)[._]', name): continue
        fits = [(len(p), part, list(ps).index(p)) for part, ps in PARTS.items() for p in ps if fnmatchcase(name, p)]
        if fits: parts[max(fits)[1]].append((max(fits)[2], name))
        else: lost.append(name)
    if lost: sys.exit(f'in no part of the sidebar (see PARTS in .ci/docs.py): {", ".join(lost)}')
    contents = [dict(section=part, contents=[f + '.ipynb' for _, f in sorted(fs)]) for part, fs in parts.items() if fs]
    return json.dumps({'website': {'sidebar': {'contents': contents}}}, indent=1)  # which is YAML, too

def process(tree, quarto):
    "In the project copied to `tree`, run what the pages show of the code and write them to `_proc`; nbdev reads the folder it stands in"
    os.chdir(tree)
    import nbdev.serve, nbdev.showdoc
    from nbdev import serve_drv
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    nbdev.showdoc.BasicMarkdownRenderer, nbdev.serve.FilterDefaults = nbdev_parts()
    refresh_quarto_yml()
    (tree/'nbs'/'sidebar.yml').write_text(sidebar(tree/'nbs'))
    wrong, process_one = [], serve_drv.main
    def keep_on(o):
        try: process_one(o)
        except Exception as e: wrong.append(f'{o[0].name}: {e}\n{e.__cause__!r}')
    serve_drv.main = keep_on
    nbdev.serve.proc_nbs(force=True, n_workers=0)
    if wrong: sys.exit('\n'.join(['these notebooks could not be processed:'] + wrong))
    if quarto: return
    cfg = get_config()
    rename(cfg.config_path/'_proc', cfg.doc_host + cfg.doc_baseurl)
    plain_config(cfg.config_path/'_proc'/'_quarto.yml')

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

def plain_config(path):
    "Leave out of Quarto's settings what smalldocs does not read: Sass, and how maths is made (`mathml` below does that)"
    cfg = yaml.safe_load(path.read_text())
    page = cfg['format']['html']
    page['theme'] = {mode: names[0] for mode, names in page['theme'].items()}
    for o in ('respect-user-color-scheme', 'html-math-method'): page.pop(o)
    path.write_text(yaml.safe_dump(cfg, sort_keys=False))

def letters(m):
    "Letters and digits of a kind, such as ℝ, as the characters that Unicode has for them: browsers read no `mathvariant` but `normal`"
    def one(c):
        name = f'{m[2].upper()} {unicodedata.name(c).replace("LATIN ", "").replace("LETTER ", "")}'
        for o in (name, f'MATHEMATICAL {name}'):
            try: return unicodedata.lookup(o)
            except KeyError: pass
        return c
    return f'<{m[1]}>{"".join(map(one, m[3]))}</{m[1]}>'

def mathml(page):
    "The formulas of a page as MathML, which browsers read without a script from elsewhere"
    from latex2mathml.converter import convert
    def one(m):
        res = convert(html.unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
        if left := re.search(r'\\\w+', re.sub(r'<[^>]+>', '', res)): raise ValueError(f'{left[0]} in the formula {html.unescape(m[2])}')
        res = re.sub(r'<(mi|mn) mathvariant="(bold|double-struck|script)">(\w+)</\1>', letters, res)
        return f'<span class="math {m[1]}">{res}</span>'
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', one, page, flags=re.S)
    return re.sub(r'<link [^>]*katex[^>]*>|<script [^>]*katex[^>]*></script>', '', page)

def finish(site, quarto):
    "Take out of the rendered `site` what comes from a foreign server, and out of its search what is no text"
    wrong = []
    for f in sorted(site.rglob('*.html')) if not quarto else []:
        try: f.write_text(mathml(f.read_text(encoding='utf-8')), encoding='utf-8')
        except ValueError as e: wrong.append(f'{f.relative_to(site)}: {e}')
    if wrong: sys.exit('\n'.join(['formulas that cannot be shown:'] + wrong))
    for f in sorted(site.rglob('*.css')):
        text = f.read_text(encoding='utf-8')
        if (new := re.sub(r'@import\s+url\(["\']?https?://[^)]*\)[^;]*;', '', text)) != text: f.write_text(new, encoding='utf-8')
    index = json.loads((site/'search.json').read_text(encoding='utf-8'))
    for o in index: o['text'] = re.sub(r'(\s*\bsource)+\s*$', '', o.get('text', ''))
    (site/'search.json').write_text(json.dumps(index, ensure_ascii=False), encoding='utf-8')

def build(tree, quarto=False):
    "Copy the project to the new folder `tree` and build its site there"
    copy_tree(tree)
    run(sys.executable, __file__, '--process', tree, *['--quarto']*quarto, env={'PYTHONPATH': str(tree)})
    render = ['quarto', 'render', '--no-cache'] if quarto else [sys.executable, '-m', 'smalldocs.cli', 'render', '.']
    said = run(*render, cwd=tree/'_proc')
    finish(tree/'_proc'/'_docs', quarto)
    return said

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--quarto', action='store_true', help='render with Quarto')
    ap.add_argument('--work', type=Path, help='new folder to build in')
    ap.add_argument('--out', type=Path, help='folder for the finished site')
    ap.add_argument('--process', type=Path, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.process: return process(a.process, a.quarto)
    with tempfile.TemporaryDirectory() as tmp:
        tree = (a.work or Path(tmp)/'miram').resolve()
        print(build(tree, a.quarto), end='')
        if a.out:
            shutil.rmtree(a.out, ignore_errors=True)
            shutil.copytree(tree/'_proc'/'_docs', a.out)
            print(f'the site is in {a.out}')

if __name__ == '__main__': main()
