"""What of a Python file runs: its text without comments, docstrings and blank lines."""

import ast
import functools
import io
import tokenize


@functools.cache
def running_code(text: str) -> str:
    """The lines of a Python file that can change what it does.

    Comments, docstrings (strings that stand alone), blank lines and the spaces that end a line are left out. The rest
    keeps its spelling, so that every version of Python finds the same.

    Raises:
        SyntaxError: the text is no Python.
    """
    written = io.StringIO(text).readlines()
    lines = [line.encode() for line in written]  # positions of the parser count bytes
    spans, inside = [], set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            spans.append(((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)):
            inside.update(range(node.lineno, node.end_lineno))  # the line ends within a string of several lines
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            start = len(written[row - 1][:column].encode())
            spans.append(((row, start), (row, start + len(token.string.encode()))))
    removed = set()
    for (first, start), (last, end) in sorted(spans, reverse=True):
        kept = lines[first - 1][:start] + lines[last - 1][end:]
        lines[first - 1 : last] = [kept] + [b"\n"] * (last - first)
        removed.update(range(first, last + 1))
    texts = ((row, raw.decode()) for row, raw in enumerate(lines, start=1))
    kept = (line if row in inside - removed else line.rstrip() + "\n" for row, line in texts)
    return "".join(line for row, line in enumerate(kept, start=1) if row in inside - removed or line.strip())
