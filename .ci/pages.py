"""What a page of the documentation says of a function or a class; `.ci/docs.py` puts it in the place of nbdev's own.

A signature keeps one parameter a line with its comment, a dataclass is a table of its fields, the definitions of a cell stand in its
order, the chapters up to the models show their source, and `name` becomes a link only where it can mean nothing else.
"""
import ast, dataclasses, inspect, io, re, textwrap, tokenize
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from common import ROOT

NOTHING = dataclasses.MISSING
HERE = {}  # The notebook in hand: its `module`, and the names that it `imports` → module

@lru_cache
def symbols():
    "Module → the names of `__all__` and the methods of its classes → page and anchor, as nbdev indexed them"
    syms, res = import_module('miram._modidx').d['syms'], {}
    for mod, names in syms.items():
        text = (ROOT/mod.replace('.', '/')).with_suffix('.py').read_text(encoding='utf-8')
        public = next(ast.literal_eval(o.value) for o in ast.parse(text).body if isinstance(o, ast.Assign) and o.targets[0].id == '__all__')
        short = {k.removeprefix(mod + '.'): v[0] for k, v in names.items()}
        shown = lambda k: (k.split('.')[0] in public or k.split('.')[0] not in short) and not re.search(r'(^|\.)_', k)
        res[mod] = {k: v for k, v in short.items() if shown(k)}
        twins = [k for k in res[mod] if any(k.lower() == o.lower() and k > o for o in res[mod])]  # `tried` beside `Tried`
        res[mod] |= {k: f'{res[mod][k]}-function' for k in twins}
    return res

def find(name):
    """Page and anchor of `name`, or None: what this notebook defines or imports, a module's full name, or a name that one module alone has
    and that is no everyday word"""
    syms, head = symbols(), name.split('.')[0]
    if HERE and name in (own := syms.get(HERE['module'], {})): return own[name]
    if HERE and name in syms.get(mod := HERE['imports'].get(head), {}): return syms[mod][name]
    if name in syms: return next(iter(syms[name].values()), '').partition('#')[0] or None
    mod, _, last = name.rpartition('.')
    if mod in syms: return syms[mod].get(last)
    has = [mod for mod, names in syms.items() if name in names]
    return syms[has[0]][name] if len(has) == 1 and re.search(r'[_A-Z\d]', head) else None

def link_line(line):
    "The names in backticks on one line as links"
    from nbdev.config import get_config
    site = get_config().doc_host + get_config().doc_baseurl
    def one(m):
        to = find(m[1].removesuffix('()'))
        return f'[`{m[1]}`]({site}/{to})' if to else m[0]
    return re.sub(r'(?<![\[`])`([A-Za-z_][\w.]*(?:\(\))?)`(?![`\]])', one, line)

def linkify(text):
    "`link_line` for every line outside fenced and indented code"
    fence, res = None, []
    for o in text.split('\n'):
        if m := re.match(r'[ >]*(`{3,}|~{3,})', o): fence = None if fence and m[1].startswith(fence) else fence or m[1]
        res.append(o if fence or m or o.startswith(('    ', '#')) else link_line(o))
    return '\n'.join(res)

def plain(anno):
    "An annotation as it was written: `Tensor`, not `torch.Tensor`"
    if anno is inspect.Parameter.empty: return ''
    return re.sub(r'\b(?:\w+\.)+(?=\w)', '', inspect.formatannotation(anno)).replace(' | ', '|').strip("'")

def shown(value):
    "A default as it was written"
    text = getattr(value, '__name__', None) or repr(value)
    return re.sub(r' at 0x[0-9a-f]+', '', text if len(text) < 60 else text[:57] + '…')

def signature_lines(params, returns, docs):
    "One line a parameter, with its comment where any has one"
    kinds = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    lines, star = [], False
    for p in params:
        if p.kind == p.KEYWORD_ONLY and not star: lines.append(('*', ''))
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        anno, default = plain(p.annotation), '' if p.default is p.empty else f'={shown(p.default)}'
        lines.append((kinds.get(p.kind, '') + p.name + (anno and f':{anno}') + default, docs.get(p.name) or ''))
    back, said = plain(returns), docs.get('return') or ''
    end = ')' + (back and f'->{back}') + ':'
    if not any(doc for _, doc in lines) and len(one := '(' + ', '.join(o for o, _ in lines) + end) < 100:
        return one + (said and f' # {said}')
    width = min(36, max(len(o) for o, _ in lines) + 1)
    body = [f'    {o},'.ljust(width + 4) + (doc and ' # ' + ' '.join(doc.split())) for o, doc in lines]
    return '\n'.join(['(', *(o.rstrip() for o in body), end + (said and f' # {said}')])

def source_class(cls):
    "The class as its module has it: what a notebook defines has no source to read comments from"
    return getattr(import_module(HERE['module']), cls.__name__, cls) if HERE and cls.__module__ == '__main__' else cls

def comments(cls):
    "Field → the comment beside or above it, of `cls` and the classes it comes from"
    res = {}
    for c in reversed([o for o in cls.__mro__ if '__annotations__' in vars(o) and o is not object]):
        src = textwrap.dedent(inspect.getsource(c))
        said = {t.start[0]: t for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type == tokenize.COMMENT}
        for o in ast.parse(src).body[0].body:
            if not isinstance(o, ast.AnnAssign): continue
            above = said.get(o.lineno - 1)
            t = said.get(o.end_lineno) or said.get(o.lineno) or (above if above and not above.line[:above.start[1]].strip() else None)
            res[o.target.id] = t.string.lstrip('#').strip() if t else ''
    return res

def fields(cls):
    "`(name, type, default or None, meaning)` for each field of a dataclass or named tuple, or None for any other class"
    if dataclasses.is_dataclass(cls):
        rows = [(f.name, f.type, f.default if f.default_factory is NOTHING else f.default_factory()) for f in dataclasses.fields(cls)]
    elif issubclass(cls, tuple) and hasattr(cls, '_fields'):
        rows = [(n, cls.__annotations__.get(n, inspect.Parameter.empty), cls._field_defaults.get(n, NOTHING)) for n in cls._fields]
    else: return None
    said = comments(source_class(cls))
    return [(n, t if isinstance(t, str) else plain(t), None if d is NOTHING else shown(d), said.get(n, '')) for n, t, d in rows]

def table(rows):
    "Fields as a Markdown table, without the column of defaults where there are none"
    cell = lambda o: o.replace('|', '\\|')
    code = lambda o: f'`{cell(o)}`' if o else ''
    some = any(d is not None for _, _, d, _ in rows)
    head = ['Field', 'Type'] + ['Default']*some + ['Meaning']
    body = [[code(n), code(t)] + [code(d) if d is not None else '']*some + [cell(m)] for n, t, d, m in rows]
    line = lambda cells: '| ' + ' | '.join(cells) + ' |'
    return '\n'.join([line(head), line(['---']*len(head)), *map(line, body)])

def render(sym, name, level, source):
    "Heading, signature or table of fields, and docstring, as Markdown"
    from fastcore.docments import docments, parse_docstring
    top = '---\n\n' + (f'[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}\n\n' if source else '')
    anchor = symbols().get(HERE.get('module'), {}).get(name, '').partition('#')[2]
    top += f'{"#"*level} {name}' + (f' {{#{anchor}}}' if anchor.endswith('-function') else '') + '\n\n'
    rows = fields(sym) if inspect.isclass(sym) else None
    told = parse_docstring(sym)
    doc = '\n\n'.join(o if isinstance(o, str) else '\n'.join(o) for o in (told['Summary'], told['Extended'])).strip()
    if rows and doc.startswith(name.split('.')[-1] + '('): doc = ''  # what `dataclass` writes where there is none
    if doc: doc = re.sub(r'^(.+)', r'*\1*', doc, count=1)
    if rows: return top + '\n\n'.join(filter(None, [doc, table(rows)])) + '\n'
    kind = 'class' if inspect.isclass(sym) else 'async def' if inspect.iscoroutinefunction(sym) else 'def'
    try: sig = inspect.signature(sym)
    except (TypeError, ValueError): return top + doc
    docs = docments(inspect.unwrap(sym), args_kwargs=True)
    back = inspect.Signature.empty if inspect.isclass(sym) else sig.return_annotation
    text = kind + ' ' + name.split('.')[-1] + signature_lines([p for n, p in sig.parameters.items() if n != 'self'], back, docs)
    return top + f'```python\n{text}\n```' + (doc and '\n\n' + doc)

def nbdev_parts():
    "Processors and a renderer of nbdev with ours in the place of four of them"
    import nbdev.processors as P
    from nbdev.doclinks import NbdevLookup
    from nbdev.process import Processor
    from nbdev.showdoc import BasicMarkdownRenderer

    class Page(BasicMarkdownRenderer):
        "`show_doc` as our pages have it"
        def _repr_markdown_(self):
            look, full = NbdevLookup(), f'{HERE.get("module")}.{self.nm}'
            return render(self.sym, self.nm, self.title_level, look.code(full if full in look.syms else self.fn))

    class WhereWeAre(Processor):
        "Note the notebook's module and what it imports of ours"
        def begin(self):
            HERE.clear()
            imports = {}
            for c in self.nb.cells:
                if c.cell_type != 'code': continue
                for o in ast.walk(ast.parse(re.sub(r'^\s*[%!].*', '', c.source, flags=re.M))):
                    if isinstance(o, ast.ImportFrom) and (o.module or '').startswith('miram'):
                        imports |= {a.name: o.module for a in o.names}
            HERE.update(module=f'miram.{P._default_exp(self.nb)}', imports=imports)
            if re.match(r'[012]\d_', Path(str(getattr(self.nb, 'path_', ''))).name): self.show_source()
        def show_source(self):
            "The chapters up to the models show the source of what they explain: an equation, and the lines that compute it"
            for c in self.nb.cells:
                if c.cell_type == 'code' and 'export' in c.directives_ and re.search(r'^(class|def|async def|@)', c.source, re.M):
                    c.directives_['exports'] = c.directives_.pop('export')

    class InOrder(P.add_show_docs):
        "The definitions of one cell in the order in which they stand there"
        def begin(self):
            super().begin()
            cells, i = self.nb.cells, 0
            for c in cells:
                if getattr(c, 'has_sd', 0): c.source = re.sub(r'^show_doc\((.*)\)$', r"show_doc(\1, name='\1')", c.source)
            while i < len(cells):
                j = i
                while j < len(cells) and getattr(cells[j], 'has_sd', 0): j += 1
                if j > i: cells[i:j] = cells[i:j][::-1]
                i = max(j, i + 1)

    class SourceLast(P.mv_exports):
        "The source that is shown stands behind what is said of all its definitions"
        def begin(self):
            cells, i = self.nb.cells, 0
            while i < len(cells):
                if cells[i].cell_type == 'code' and 'exports' in cells[i].directives_:
                    j = i + 1
                    while j < len(cells) and getattr(cells[j], 'has_sd', 0): j += 1
                    cells[i:j] = cells[i + 1:j] + [cells[i]]
                    i = j
                else: i += 1

    def add_links(cell):
        "Names in prose and in what `show_doc` says become links; code stays code"
        if cell.cell_type == 'markdown': cell.source = linkify(cell.source)
        for o in cell.get('outputs', []):
            if hasattr(o, 'data') and 'text/markdown' in o['data']:
                text = o['data']['text/markdown']
                o['data']['text/markdown'] = linkify(''.join(text)).splitlines(keepends=True)

    class Filter(P.FilterDefaults):
        "nbdev's processors, with these instead"
        def base_procs(self):
            ours = {P.add_show_docs: InOrder, P.mv_exports: SourceLast, P.add_links: add_links}
            return [WhereWeAre] + [ours.get(o, o) for o in super().base_procs()]

    return Page, Filter
