"""Numbers that others have published for these tasks, to stand beside ours."""

from experiments.runs.tables import table

SOURCE = (
    "Exact match in %, ASEntmax (arXiv 2506.16640), Table 1, Transformers with NAPE, best of 3 "
    "seeds and several learning rates, 1,000 sequences a length. **Second-hand**: through the "
    "report files of the public repository jtaylor-eng/asentmax, not read in the paper itself. "
    "What is not in these tables we do not know; no table of arXiv 2601.22766 was found."
)
DOUBTFUL = "entmax 1.5 (doubtful: but for the last cell the row below)"
# Lengths, then a row a method.
EXACT: dict[str, tuple[tuple[int, ...], dict[str, tuple[float, ...]]]] = {
    "sort": (
        (64, 128, 256, 512),
        {
            "softmax": (100, 0, 0, 0),
            "top-k (32)": (100, 92.5, 0, 0),
            "SSMax": (100, 0, 0, 0),
            "entmax 1.5": (100, 99.3, 57.8, 0),
            "ASEntmax": (100, 100, 79.7, 0),
        },
    ),
    "reverse": (
        (64, 96, 128, 256, 512),
        {
            "softmax": (100, 36, 0, 0, 0),
            "entmax 1.5": (100, 100, 93.5, 28.5, 2.5),
            "ASEntmax": (100, 100, 99.8, 96.4, 56.7),
        },
    ),
    "copy": (
        (64, 128, 256, 512, 1024, 2048, 4096),
        {
            "softmax": (100, 100, 99.9, 99.9, 99.4, 96.1, 85.5),
            DOUBTFUL: (100, 100, 99.9, 99.7, 99.4, 96.3, 0.0),
            "ASEntmax": (100, 100, 99.9, 99.7, 99.4, 96.3, 86.6),
        },
    ),
    "mqmtar": (
        (64, 128, 256, 1024, 4096, 16_384, 65_536),
        {
            "softmax": (100, 100, 100, 99.5, 97.8, 80.2, 3.0),
            "entmax 1.5": (100, 100, 100, 99.5, 92.7, 66.8, 9.3),
            "ASEntmax": (100, 100, 100, 99.7, 99.6, 99.0, 95.3),
        },
    ),
}


def anchors(task: str) -> str:
    """Return the published table of a task, in Markdown; "" where none is known."""
    if task not in EXACT:
        return ""
    lengths, rows = EXACT[task]
    heads = (f"published: {task}", *(f"{length:,}" for length in lengths))
    return table(heads, [(name, *(f"{x:.1f}" for x in row)) for name, row in rows.items()])


def others() -> str:
    """Return the published tables of all tasks, with where they come from."""
    return "\n\n".join((*map(anchors, EXACT), SOURCE))
