"""Everything `.ci/run` checks beside the notebooks themselves. All checks run, also after one has failed; none writes into the project.

    python .ci/checks.py [CHECK …]

A check is a function: it returns a remark, raises `Skip` where it cannot run, and fails by any other exception.
"""
import ast, difflib, functools, json, os, re, runpy, shutil, subprocess, sys, tempfile, time
from configparser import ConfigParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import yaml

try: import tomllib
except ImportError: import tomli as tomllib  # before Python 3.11

import doc_checks
from common import ROOT, copy_tree, run, tally

BIN, TMP = Path(sys.executable).parent, Path(tempfile.gettempdir())
CHECKS = []

class Skip(Exception): "What a check raises that cannot run here"

def check(f):
    "Add `f` to the checks, in the order of this file"
    CHECKS.append(f)
    return f

def once(f):
    "Call `f` the first time; later calls give the same result, or say that it failed"
    got = []
    @functools.wraps(f)
    def inner():
        if not got:
            try: got.append(f())
            except Skip: raise
            except Exception: got.append(AssertionError(f'{f.__name__} failed above')); raise
        if isinstance(got[0], Exception): raise got[0]
        return got[0]
    return inner

def texts(top, *patterns):
    "Path below `top` → text, for the files that match"
    return {f.relative_to(top).as_posix(): f.read_text(encoding='utf-8') for p in patterns for f in sorted(top.glob(p)) if f.is_file()}

def same(old, new, what):
    "Fail with the first differences between two dicts of texts"
    lines = []
    for f in sorted(old.keys() | new.keys()):
        if f not in old or f not in new: lines.append(f'{f}: ' + ('is not there' if f not in old else 'should not be there'))
        elif old[f] != new[f]:
            lines += list(difflib.unified_diff(old[f].splitlines(), new[f].splitlines(), f, 'expected', lineterm='', n=1))[:25]
    if lines: raise AssertionError('\n'.join([what] + lines[:80]))

def cells():
    "`(notebook, number, cell, source)` for every cell of every notebook"
    for f in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if any(o.startswith(('.', '_')) for o in f.relative_to(ROOT).parts): continue
        for i, c in enumerate(json.loads(f.read_text(encoding='utf-8'))['cells']):
            yield f.relative_to(ROOT).as_posix(), i, c, ''.join(c['source'])

def none(wrong, what):
    "Fail when the list `wrong` holds anything"
    if wrong: raise AssertionError('\n'.join([what] + wrong[:40]))

@check
def notebooks_clean():
    "nbdev_clean finds nothing to do"
    tree = copy_tree(TMP/'clean')
    run(BIN/'nbdev_clean', cwd=tree)
    same(texts(ROOT, 'nbs/**/*.ipynb'), texts(tree, 'nbs/**/*.ipynb'), "not clean: 'make export'")

@check
def export_in_sync():
    "nbdev_export, from nothing, writes the modules that stand here"
    tree = copy_tree(TMP/'export')
    version = (tree/'miram'/'__init__.py').read_text()
    shutil.rmtree(tree/'miram')
    (tree/'miram').mkdir()
    (tree/'miram'/'__init__.py').write_text(version)
    run(BIN/'nbdev_export', cwd=tree, env={'PYTHONPATH': str(tree)})
    files = 'miram/**/*.py', 'settings.ini', 'setup.py', 'pyproject.toml'
    same(texts(ROOT, *files), texts(tree, *files), "miram/ is not what the notebooks export: 'make export'")

@check
def export_by_nbdev_3():
    "nbdev 3, which reads pyproject.toml, exports the same modules and the same index of names"
    ini, toml = ConfigParser(delimiters=['=']), tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['tool']['nbdev']
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    wrong = [f'{k}: {v} in pyproject.toml, {ini["DEFAULT"][k]} in settings.ini' for k, v in toml.items()
             if k in ini['DEFAULT'] and str(v) != ini['DEFAULT'][k]]
    none(wrong, 'settings that differ:')
    env, tree = TMP/'nbdev3', copy_tree(TMP/'export3')
    run(BIN/'uv', 'venv', '--python', sys.executable, env)
    run(BIN/'uv', 'pip', 'install', '--python', env/'bin'/'python', 'nbdev>=3,<4')
    was = {f: text for f, text in texts(ROOT, 'miram/**/*.py').items()}
    for f in was: (tree/f).write_text('' if f != 'miram/__init__.py' else was[f], encoding='utf-8')
    run(env/'bin'/'nbdev-export', cwd=tree, env={'PYTHONPATH': str(tree)})
    new = texts(tree, 'miram/**/*.py')
    index = [runpy.run_path(str(top/'miram'/'_modidx.py'))['d']['syms'] for top in (ROOT, tree)]
    assert index[0] == index[1], 'nbdev 3 indexes other names'
    for o in (was, new): o.pop('miram/_modidx.py')
    same(was, new, 'nbdev 3 exports something else')
    return run(env/'bin'/'python', '-c', 'import importlib.metadata as m; print("nbdev", m.version("nbdev"))').strip()

@check
def readme_in_sync():
    "README.md is what nbs/index.ipynb gives"
    return run(sys.executable, ROOT/'.ci'/'readme.py', '--check').strip()

@check
def pyflakes():
    "pyflakes has nothing to say about miram/ and .ci/"
    run(sys.executable, '-m', 'pyflakes', 'miram', '.ci')

@check
def versions():
    "Version and Pythons are the same wherever they stand, and the newest entry of the release notes is dated or called unreleased"
    read = lambda f: (ROOT/f).read_text(encoding='utf-8')
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    cfg, top = ini['DEFAULT'], re.search(r'^## (.*)$', read('CHANGELOG.md'), re.M)[1]
    m = re.fullmatch(r'(\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)', top)
    assert m, f'CHANGELOG.md begins with {top!r}, not with a version and (unreleased) or the date of its release'
    found = {'settings.ini': cfg['version'], 'CHANGELOG.md': m[1], 'CITATION.cff': str(yaml.safe_load(read('CITATION.cff'))['version']),
             'miram/__init__.py': re.search(r'__version__ = "(.*)"', read('miram/__init__.py'))[1]}
    assert len(set(found.values())) == 1, f'versions that differ: {found}'
    minor = [int(o) for o in re.search(r'3\.{o}\' for o in \(([\d, ]+)\)', read('setup.py'))[1].split(',')]
    job = yaml.safe_load(read('.github/workflows/test.yaml'))['jobs']['test']['strategy']['matrix']
    tested = [int(o.split('.')[1]) for o in job['python']]
    assert minor == tested, f'Pythons declared in setup.py: {minor}, tested by the workflow: {tested}'
    assert cfg['min_python'] == f'3.{minor[0]}', f'the oldest Python is {cfg["min_python"]} in settings.ini'
    return f'{m[1]}, Python 3.{minor[0]} to 3.{minor[-1]}'

@check
def ruff():
    "ruff, with the rules of pyproject.toml, has nothing to say about miram/ and .ci/"
    run(BIN/'ruff', 'check', '--no-cache', '--output-format', 'concise')

@check
def line_length():
    "No line of code is longer than 140 columns"
    files = texts(ROOT, 'miram/**/*.py', '.ci/*', 'setup.py', 'Makefile')
    files.pop('miram/_modidx.py', None)
    wrong = [f'{f}:{n}: {len(o)} columns' for f, text in files.items() for n, o in enumerate(text.splitlines(), 1) if len(o) > 140]
    code = [(f'{f} [{i}]', src.splitlines()) for f, i, c, src in cells() if c['cell_type'] == 'code']
    wrong += [f'{where}: {len(o)} columns: {o[:60]}…' for where, lines in code for o in lines if len(o) > 140]
    none(wrong, 'too long:')

FENCED = re.compile(r'^( *)(`{3,}|~{3,}).*?^\1\2[^\n]*$', re.M | re.S)

@check
def notebook_form():
    """The title stands alone in its cell, and so do imports: the documentation build runs cells with imports, and only those. No cell is
    empty, and none holds what Jupyter shows as it is written: Quarto's fenced divs, or the marks between the cells of a script"""
    wrong = []
    for f, i, c, src in cells():
        if not src.strip(): wrong.append(f'{f} [{i}]: an empty cell')
        if c['cell_type'] == 'markdown' and re.search(r'^:::', FENCED.sub('', src), re.M):
            wrong.append(f"{f} [{i}]: Jupyter shows ':::' as text: write a callout as a quotation that begins with a bold title")
        if m := re.search(r'^(#\s*)?%%%%|^# %%', src, re.M): wrong.append(f'{f} [{i}]: two cells in one, at {m[0]!r}')
        if i == 0 and not re.fullmatch(r'# [^\n]+\n+> [^\n]+\s*', src): wrong.append(f'{f} [0]: not a title and a subtitle alone')
        if c['cell_type'] != 'code' or re.search(r'^#\s*\|\s*(export|default_exp)|nbdev_export\(|^\s*[%!]', src, re.M): continue
        try: nodes = list(ast.walk(ast.parse(src)))
        except SyntaxError as e: wrong.append(f'{f} [{i}]: {e}'); continue
        if any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in nodes) and any(isinstance(o, (ast.Expr, ast.Assign)) for o in nodes):
            wrong.append(f'{f} [{i}]: imports and other code in one cell: {src.strip().splitlines()[-1][:60]}')
    none(wrong, 'notebooks that the documentation build reads wrongly:')

def modules():
    "Module → `(notebook below nbs/, tree of its code)` for every module that a notebook exports"
    res = {}
    for f, text in texts(ROOT, 'miram/**/*.py').items():
        m = re.search(r'^# AUTOGENERATED.*File to edit: \S*?nbs/(\S+\.ipynb)', text, re.M)
        if m: res[f.removesuffix('.py').replace('/', '.')] = m[1], ast.parse(text)
    return res

def imported(module, tree):
    "`(line, name)` of what `module` imports, at its top or inside a function, relative imports spelled out; of `from a import b`, `a.b`"
    for o in ast.walk(tree):
        if isinstance(o, ast.Import): yield from ((o.lineno, a.name) for a in o.names)
        if not isinstance(o, ast.ImportFrom): continue
        top = '.'.join(module.split('.')[:-o.level] + ([o.module] if o.module else [])) if o.level else o.module
        yield from ((o.lineno, f'{top}.{a.name}') for a in o.names)

@check
def floors():
    "A notebook's number is its own, its folder is its sub-package, and no module imports from a higher number"
    mods = modules()
    nbs = {f.removeprefix('nbs/') for f, *_ in cells()}
    numbers = {f: int(m[1]) for f in nbs if (m := re.match(r'(?:.*/)?(\d\d)_[^/]+$', f))}
    order = sorted(numbers, key=lambda f: (numbers[f], f))
    wrong = [f'nbs/{a} and nbs/{b} have one number' for a, b in zip(order, order[1:]) if numbers[a] == numbers[b]]
    wrong += [f'nbs/{nb} exports no module' for nb in numbers.keys() - {nb for nb, _ in mods.values()}]
    for mod, (nb, tree) in mods.items():
        home = 'miram.' + re.sub(r'(^|/)\d\d_', r'\1', nb.removesuffix('.ipynb')).replace('/', '.')
        if nb not in numbers: wrong.append(f'nbs/{nb} exports {mod} and has no number')
        elif mod not in (home, home.rpartition('.')[0] + '.__main__'): wrong.append(f'nbs/{nb} exports {mod}, not {home}')
        else:
            for line, name in imported(mod, tree):
                to = name if name in mods else name.rpartition('.')[0]
                if to in mods and (n := numbers.get(mods[to][0], -1)) > numbers[nb]:
                    wrong.append(f'{mod.replace(".", "/")}.py:{line}: floor {numbers[nb]:02} imports {to} from floor {n:02}')
    none(wrong, 'not in the order of the house:')
    return f'{len(mods)} modules'

@check
def first_cell():
    "The first cell that a reader runs in Jupyter, `from miram.all import *`, prints nothing"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('from miram.all import *')])
    NotebookClient(nb, timeout=300, kernel_name='python3', extra_arguments=['--IPKernelApp.log_level=ERROR']).execute()
    none([str(o.get('text', o.get('evalue', o))) for o in nb.cells[0].outputs], 'it prints:')

@check
def mutations():
    "Each way to break an attention that .ci/mutate.py knows is noticed by a cell, and no change at all is not"
    kept = subprocess.run([sys.executable, ROOT/'.ci'/'mutate.py', 'unchanged'], capture_output=True, text=True,
                          env={**os.environ, 'MIRAM_TALLY': ''})
    assert kept.returncode==1 and 'SURVIVED  unchanged' in kept.stdout, f'an unchanged attention must survive:\n{kept.stdout}{kept.stderr}'
    return run(sys.executable, ROOT/'.ci'/'mutate.py', env={'MIRAM_TALLY': ''}).strip().splitlines()[-1]

@check
def fuzz():
    "Broken files, tables, settings and calls of commands are refused, or read as the reference readers read them"
    if not hasattr(os, 'fork'): raise Skip('needs a system that can fork')
    out = run(sys.executable, '-m', 'miram.fuzz', '--n', '300', '--seed', '20', '--workers', '2', env=dict(OMP_NUM_THREADS='1'))
    return f'{out.splitlines()[-2].split()[-1]} inputs'

@once
def site():
    "The folder with the site's source; the site is in its `_docs`"
    if sys.version_info < (3, 11): raise Skip('smalldocs needs Python 3.11')
    run(sys.executable, ROOT/'.ci'/'docs.py', '--work', TMP/'docs')
    return TMP/'docs'/'_proc'

@check
def docs_built():
    "The documentation builds, one page a notebook"
    pages = [o for o in (site()/'_docs').rglob('*.html') if o.name != '404.html']
    count = len({f for f, *_ in cells()})
    assert len(pages) == count, f'{len(pages)} pages from {count} notebooks'
    return f'{count} pages'

@check
def docs_links():
    "smalldocs check finds no broken link in it, and no link was left as text (a `name` in a link's text is made a link of its own)"
    left = [f.name for f in (site()/'_docs').rglob('*.html') if re.search(r'\]\([^)<]*\.ipynb', f.read_text(encoding='utf-8'))]
    assert not left, f'a Markdown link is left as text in {", ".join(left)}: write the `name` without a link around it'
    return run(BIN/'smalldocs', 'check', site()).strip()

def docs_check(f):
    "Make a check of what must not be on the rendered pages"
    @functools.wraps(f)
    def inner(): none(list(f(site()/'_docs')), 'on the pages:')
    inner.__name__, inner.__doc__ = f'docs_{f.__name__}', f'There are no {f.__doc__[0].lower()}{f.__doc__[1:]}'
    return check(inner)

for f in doc_checks.ALL: docs_check(f)

class Pages(SimpleHTTPRequestHandler):
    "The site, and a page that opens all others at two widths and tells what it saw"
    def do_GET(self):
        if self.path != '/measure': return super().do_GET()
        top = Path(self.directory)
        names = sorted(f.relative_to(top).as_posix() for f in top.rglob('*.html') if f.name != '404.html')
        body = (ROOT/'.ci'/'measure.html').read_text(encoding='utf-8').replace('PAGES', json.dumps(names)).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.server.told = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()
    def log_message(self, *args): pass

def measure(browser, site, profile):
    "Page and width → title, broken pictures and what is wider than the page, as the browser sees the pages below `site`"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Pages, directory=str(site)))
    server.done, server.told = Event(), dict(error='the browser did not answer')
    Thread(target=server.serve_forever, daemon=True).start()
    cmd = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
           '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage', f'--user-data-dir={profile}', '--hide-scrollbars',
           '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', '--window-size=1500,900', '--remote-debugging-port=0',
           f'http://127.0.0.1:{server.server_port}/measure']
    p = subprocess.Popen(cmd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: server.done.wait(600)
    finally:
        p.terminate()
        p.wait(30)
        server.shutdown()
    assert 'error' not in server.told, server.told['error']
    return server.told

@check
def docs_in_browser():
    """A browser opens every page as a phone and a screen show it, finds its title, every picture loads, nothing is wider than the
    page, and what the search finds can be read, light and dark"""
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if not browser: raise Skip('no Chromium is installed')
    seen, wrong = measure(browser, site()/'_docs', TMP/'browser'), []
    for scheme, o in seen.pop('search').items():
        if not o['found']: wrong.append(f'index.html, {scheme}: the search finds nothing')
        if o['faint']: wrong.append(f'index.html, {scheme}: text with too little contrast: {o["faint"]}')
    for name, o in seen.items():
        page, width = name.split(' at ')
        nb = json.loads((site()/page).with_suffix('.ipynb').read_text(encoding='utf-8'))
        want = yaml.safe_load(''.join(nb['cells'][0]['source']).strip().strip('-'))['title']
        if want not in o['title']: wrong.append(f'{page}: the title is {o["title"]!r}, not {want!r}')
        if o['broken']: wrong.append(f'{page}: pictures that do not load: {o["broken"]}')
        if o['wide']: wrong.append(f'{page}: wider than {width} pixels: {o["wide"]}')
    none(wrong, 'as the browser shows them:')
    return f'{len(seen)} views'

@once
def wheel():
    "The wheel, built from the source distribution as an index would get it"
    run(BIN/'uv', 'build', '--out-dir', TMP/'dist', '--python', sys.executable, cwd=copy_tree(TMP/'wheel'))
    found = list((TMP/'dist').glob('*.whl'))
    assert len(found) == 1, f'wheels built: {found}'
    return found[0]

@check
def wheel_built():
    "Source distribution and wheel build, and hold every module and plan, and the mark that says that they are typed"
    from zipfile import ZipFile
    names = set(ZipFile(wheel()).namelist())
    missing = {'miram/py.typed', *texts(ROOT, 'miram/**/*.py', 'miram/**/*.toml')} - names
    assert not missing, f'not in the wheel: {sorted(missing)}'
    others = {o.split('/')[0] for o in names if '.dist-info/' not in o} - {'miram'}
    assert not others, f'does not belong into the wheel: {sorted(others)}'
    return wheel().name

@once
def user_env():
    "A user's environment: the wheel with the newest versions of what it requires, none of the development pins"
    env = TMP/'user'
    run(BIN/'uv', 'venv', '--python', sys.executable, env)
    run(BIN/'uv', 'pip', 'install', '--python', env/'bin'/'python', wheel())
    return env/'bin'

def in_user_env(code):
    "The last line that `code` prints in that environment, in a folder that holds nothing of this one"
    (TMP/'elsewhere').mkdir(exist_ok=True)
    return run(user_env()/'python', '-W', 'error::DeprecationWarning:miram', '-I', '-c', code, cwd=TMP/'elsewhere').strip().splitlines()[-1]

@check
def wheel_imports():
    "Every module imports in an environment without the pins (newest fastai and fastcore)"
    return in_user_env('''
import importlib, pkgutil, miram
from importlib.metadata import PackageNotFoundError, version
assert 'site-packages' in miram.__file__, miram.__file__
names = [o.name for o in pkgutil.walk_packages(miram.__path__, 'miram.') if not o.name.endswith('._modidx')]
for o in names: importlib.import_module(o)
try: version('nbdev')
except PackageNotFoundError: pass
else: raise SystemExit('nbdev came along: it is for development alone')
print(f'{len(names)} modules, ' + ', '.join(f'{o} {version(o)}' for o in ('torch', 'timm', 'fastai', 'fastcore')))''')

@check
def wheel_commands():
    "Every command it installs answers"
    from nbdev.config import get_config
    names = [o.split('=')[0] for o in get_config(path=ROOT).console_scripts.split()]
    for name in names:
        out = run(user_env()/name, '--help', cwd=user_env())
        assert f'usage: {name}' in out, f'{name} --help:\n{out}'
    return ', '.join(names)

@check
def wheel_computes():
    "A training step of each attention on made-up images gives finite losses and gradients to every parameter"
    return in_user_env('''
import torch
from miram.attention.registry import attention_names
from miram.models.losses import MultiScaleLoss
from miram.models.miram import create_miram
torch.manual_seed(0)
low, high = torch.rand(2,1,32,32), torch.rand(2,1,64,64)
res = []
for name in attention_names():
    model = create_miram('vit_demo', 32, 8, attention=name, dec_dim=32, dec_depth=1, dec_heads=2)
    loss = MultiScaleLoss(8)(model(low), high)
    loss.backward()
    assert loss.isfinite() and loss > 0, (name, loss)
    bad = [n for n,p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not bad, (name, bad)
    res.append(f'{name} {loss:.2f}')
print(', '.join(res))''')

def one(f):
    "Run the check `f`: `('ok' | 'skip' | 'FAILED', remark)`"
    try: return 'ok', f() or ''
    except Skip as e: return 'skip', str(e)
    except (AssertionError, RuntimeError) as e: return 'FAILED', str(e)
    except Exception as e: return 'FAILED', f'{type(e).__name__}: {e}'

def main():
    global TMP
    names, known = set(sys.argv[1:]), [f.__name__ for f in CHECKS]
    if names - set(known): sys.exit(f'no such check: {", ".join(names - set(known))}; there are {", ".join(known)}')
    todo = [f for f in CHECKS if not names or f.__name__ in names]
    count = dict(ok=0, FAILED=0, skip=0)
    with tempfile.TemporaryDirectory(prefix='miram-checks-') as tmp:
        TMP = Path(tmp)
        for f in todo:
            start = time.time()
            state, remark = one(f)
            count[state] += 1
            brief = f' ({remark})' if remark and state != 'FAILED' else ''
            print(f'{state:6} {time.time() - start:6.1f} s  {f.__name__}: {" ".join(f.__doc__.split())}{brief}', flush=True)
            if state == 'FAILED': print(remark, flush=True)
    skipped = f', {count["skip"]} skipped' if count['skip'] else ''
    print(f'checks: {count["ok"]} passed, {count["FAILED"]} failed{skipped}')
    tally(count['ok'], count['FAILED'], count['skip'])
    return count['FAILED'] > 0

if __name__ == '__main__': sys.exit(main())
