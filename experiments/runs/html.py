"""The Markdown of our tables as HTML: headings, paragraphs, lists, tables, bold, code."""

import html
import re


def to_html(markdown: str) -> str:
    """Turn the blocks of a text, which blank lines separate, into HTML.

    >>> print(to_html("## A & B\\n\\nSome **text**.\\n\\n- one\\n- two"))
    <h2>A &amp; B</h2>
    <p>Some <strong>text</strong>.</p>
    <ul><li>one</li><li>two</li></ul>
    """
    return "\n".join(_block(block) for block in re.split(r"\n\s*\n", markdown.strip()) if block)


def _block(block: str) -> str:
    lines = block.strip().splitlines()
    if heading := re.fullmatch(r"(#+) (.*)", lines[0]):
        rest = "\n".join(lines[1:])
        level = len(heading[1])
        return f"<h{level}>{_inline(heading[2])}</h{level}>" + (f"\n{_block(rest)}" if rest else "")
    if all(line.startswith("|") for line in lines) and len(lines) > 1:
        return _table(lines)
    if all(line.startswith("- ") for line in lines):
        return f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _table(lines: list[str]) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    header, rule, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    right = [cell.endswith(":") for cell in rule]

    def row(cells: list[str], tag: str) -> str:
        marks = [' class="r"' if flush else "" for flush in right]
        inside = (
            f"<{tag}{mark}>{_inline(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    # What others have published must not pass for ours.
    kind = ' class="published"' if header[0].startswith("published") else ""
    body = "".join(row(cells, "td") for cells in rows)
    head = row(header, "th")
    return (
        f'<div class="wide"><table{kind}><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    )


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
