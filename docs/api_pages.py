"""Pages of the package's interface, written from its sources without importing it.

The comments beside parameters, "docments", say what each of them is: its shape, unit or range.
"""
import ast
import io
import tokenize
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Parameter:
    "One argument of a function, or field of a dataclass"
    name:str
    kind:str=""       # its annotation
    default:str=""
    comment:str=""


@dataclass
class Entry:
    "A function, class, method or constant"
    name:str
    what:str              # function, class, method or data, as Sphinx calls them
    first:int             # lines in the source
    last:int
    signature:str=""
    text:str=""           # the docstring
    parameters:list=field(default_factory=list)
    returns:Parameter|None=None
    members:list=field(default_factory=list)


def line_comments(
    source:str,
)->dict[int,str]: # line -> comment
    "The comment at the end of each line"
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ").strip()
    return found


def text_of(node):
    "The source of an expression; nothing for none"
    return ast.unparse(node) if node is not None else ""


def parameters_of(function, comments):
    "The parameters of a function, each with its docment"
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain)-len(a.defaults)) + a.defaults
    rows = list(zip(plain, defaults, [""]*len(plain)))
    rows += [(a.vararg, None, "*")] if a.vararg else []
    rows += list(zip(a.kwonlyargs, a.kw_defaults, [""]*len(a.kwonlyargs)))
    rows += [(a.kwarg, None, "**")] if a.kwarg else []
    lines = [(default or arg).end_lineno for arg, default, _ in rows]
    end = function.returns.end_lineno if function.returns is not None else 0
    found = []
    for i, (arg, default, stars) in enumerate(rows):
        alone = lines[i] not in (*lines[i+1:], end)  # a comment belongs to the last one of its line
        comment = comments.get(lines[i], "") if alone else ""
        found.append(Parameter(
            stars+arg.arg, text_of(arg.annotation), text_of(default), comment))
    return [p for p in found if p.name not in ("self", "cls")]


def returned(function, comments):
    "What a function returns, if its source says it"
    arguments = [*function.args.args, *function.args.kwonlyargs]
    end = function.body[0].lineno - 1
    if function.returns is not None:
        end = function.returns.end_lineno
    elif end in {arg.end_lineno for arg in arguments}:
        end = 0
    comment = comments.get(end, "")
    kind = text_of(function.returns)
    return Parameter("", kind, "", comment) if kind or comment else None


def signature_of(parameters, kind=""):
    "Names, types and defaults in parentheses"
    parts = []
    for p in parameters:
        part = f"{p.name}: {p.kind}" if p.kind else p.name
        parts.append(f"{part} = {p.default}" if p.default else part)
    return f"({', '.join(parts)})" + (f" -> {kind}" if kind else "")


def function_entry(node, comments, what="function"):
    "The entry of a function or method"
    parameters = parameters_of(node, comments)
    returns = returned(node, comments)
    signature = signature_of(parameters, returns.kind if returns else "")
    text = ast.get_docstring(node) or ""
    lines = node.lineno, node.end_lineno
    return Entry(node.name, what, *lines, signature, text, parameters, returns)


def class_entry(node, comments):
    "The entry of a class: what it is made with, and its public methods"
    methods = [n for n in node.body if isinstance(n, FUNCTIONS)]
    made = next((n for n in methods if n.name == "__init__"), None)
    if made:
        parameters = parameters_of(made, comments)
    else:
        parameters = []
        for n in node.body:
            if isinstance(n, ast.AnnAssign):
                default, comment = text_of(n.value), comments.get(n.end_lineno, "")
                parameters.append(
                    Parameter(text_of(n.target), text_of(n.annotation), default, comment))
    public = [n for n in methods if not n.name.startswith("_") and ast.get_docstring(n)]
    members = [function_entry(n, comments, "method") for n in public]
    text = ast.get_docstring(node) or ""
    signature = signature_of(parameters) if parameters else ""
    return Entry(node.name, "class", node.lineno, node.end_lineno, signature, text, parameters,
                 None, members)


def read_module(source):
    "The docstring, an entry for each name that is exported, and what comes from other modules"
    tree = ast.parse(source)
    comments = line_comments(source)
    public, entries = set(), {}
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            entries[node.name] = function_entry(node, comments)
        elif isinstance(node, ast.ClassDef):
            entries[node.name] = class_entry(node, comments)
        elif isinstance(node, ast.Assign):
            for name in [t.id for t in node.targets if isinstance(t, ast.Name)]:
                if name == "__all__":
                    public = set(ast.literal_eval(node.value))
                comment = comments.get(node.end_lineno, "")
                entries[name] = Entry(name, "data", node.lineno, node.end_lineno, text=comment)
    shown = [entry for name, entry in entries.items() if name in public]
    return ast.get_docstring(tree) or "", shown, sorted(public - entries.keys())


# ---- As Markdown


def cell(text):
    "A text inside a table"
    return text.replace("|", r"\|").replace("\n", " ")


def code(text):
    "Code inside a table"
    return f"`{cell(text)}`" if text else ""


def prose(text):
    "A comment or docstring as Markdown: what would be markup of a page is escaped"
    return text.replace("*", r"\*").replace("<", "&lt;").replace("$", r"\$")


def parameter_table(parameters):
    "What each argument is"
    if not any(p.comment for p in parameters):
        return ""
    lines = ["| argument | type | default | |", "|---|---|---|---|"]
    for p in parameters:
        cells = code(p.name), code(p.kind), code(p.default), cell(prose(p.comment))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def entry_page(entry, url, fence=6):
    "One entry, as a directive of Sphinx; `url` leads to the source"
    ticks = "`"*fence
    parts = [f"{ticks}{{py:{entry.what}}} {entry.name}{entry.signature}\n\n"]
    if entry.text:
        parts.append(prose(entry.text) + "\n\n")
    parts.append(parameter_table(entry.parameters))
    if entry.returns and entry.returns.comment:
        kind = f"`{entry.returns.kind}`, " if entry.returns.kind else ""
        parts.append(f"Returns {kind}{prose(entry.returns.comment)}\n\n")
    parts += [entry_page(member, url, fence-1) + "\n" for member in entry.members]
    if entry.what != "method":
        parts.append(f"[source]({url}#L{entry.first}-L{entry.last})\n")
    return "".join(parts) + f"{ticks}\n"


def module_page(name, source, url, lesson):
    "The page of a module; `lesson` is a Markdown link to the notebook that explains it"
    text, entries, others = read_module(source)
    head = f"# t2i.{name}\n\n{prose(text)}\n\nExplained in {lesson}. [Source]({url}).\n\n"
    if others:
        head += f"Also here, from another module: {', '.join(map(code, others))}.\n\n"
    module = f"```{{py:module}} t2i.{name}\n```\n\n"
    return head + module + "\n".join(entry_page(entry, url) for entry in entries)
