"""A divergence over the whole vocabulary, forward and backward, from hidden states and heads: time, memory, error of each form.

    python -m benchmarks.loss                                      # V = 151,936, H = 1,024, 2,048 tokens, three divergences
    python -m benchmarks.loss --hidden 1024,2048,4096 --tokens 2048,8192,16384
    python -m benchmarks.loss --tiny

Time is also said in shares of the four matrix products that no form can leave out, measured in the same round; memory is what
a form takes beyond the gradient of the head, which each must leave. Forms whose logits would not fit the free memory are
skipped with a sentence. benchmarks/README.md says how to read the table.
"""

from pathlib import Path
from typing import Any

from benchmarks import side_by_side
from benchmarks.loss_forms import DIVERGENCES, FORMS
from benchmarks.side_by_side import OURS, Side, Spread, Table, middle, ratios, say
from benchmarks.step import VERSION, trl_python

VOCAB = 151_936  # Qwen3's
NAIVE_TENSORS = 9
"""Tensors [tokens, V] that the naive form holds at its peak, about."""


def free() -> int:
    """Bytes of memory that a process may take here."""
    info = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))


def needs(form: str, vocab: int, hidden: int, tokens: int) -> int:
    """The bytes that a form takes, about: heads and gradients, and all logits where it keeps them."""
    heads = 4 * 4 * vocab * hidden
    return heads + (NAIVE_TENSORS * 4 * vocab * tokens if form == "naive" else 2**31 + 4 * vocab * hidden)


def sides(table: Table, given: dict[str, Any], trl: Path | None) -> list[Side]:
    found = [Side("products", "loss_forms", {"form": "products", **given})]
    for form in FORMS:
        if form == "trl" and trl is None:
            continue
        if (wants := needs(form, given["vocab"], given["hidden"], given["tokens"])) > free():
            say(f"{form} is skipped: it would take about {wants / 2**30:.0f} GiB, and {free() / 2**30:.0f} are free")
            continue
        made = Side(form, "loss_forms", {"form": form, **given})
        found.append(made if form != "trl" or trl is None else Side(form, "loss_forms", made.given, python=trl))
    ours = {"form": OURS, **given}
    return found + [Side(name, "loss_forms", ours, repo=path) for name, path in table.options.sides.items()]


def seconds(row: dict[str, Any]) -> float:
    return row["cpu" if row["threads"] == 1 else "wall"]


def report(table: Table, case: str) -> str:
    kind = "CPU s" if table.options.threads == 1 else "wall s"
    titles = [case, kind, "x products", "extra MiB", "error, nats", "time / ours", "memory / ours"]
    products = table.of(case, "products")
    rows = [["four products", f"{middle(products, seconds):.2f}", "1.00x (1.00-1.00)", "", "", "", ""]]
    for name in (*FORMS, *table.options.sides):
        if not (found := table.of(case, name)):
            continue
        times = ratios(table, case, name, seconds, ours="products")
        cells = [f"{middle(found, seconds):.2f}", str(times), f"{middle(found, lambda row: row['extra']) / 2**20:,.0f}"]
        cells.append(f"{max(row['error'] for row in found):.0e}")
        cells += ["", ""] if name == OURS else [str(one) for one in pairs(table, case, name).values()]
        rows.append([name, *cells])
    return side_by_side.lines(titles, rows)


def pairs(table: Table, case: str, side: str) -> dict[str, Spread]:
    """Seconds of the other form over ours, and its extra memory over ours."""
    found = {"time": seconds, "memory": lambda row: max(row["extra"], 1)}
    spreads = {what: ratios(table, case, side, number) for what, number in found.items()}
    return {what: spread for what, spread in spreads.items() if spread is not None}


def main(given: list[str] | None = None) -> Table:
    made = side_by_side.parser(__doc__ or "", rounds=3)
    made.add_argument("--vocab", type=int, default=VOCAB)
    made.add_argument("--hidden", default="1024", help="widths, with commas between them")
    made.add_argument("--tokens", default="2048")
    made.add_argument("--divergences", default=",".join(DIVERGENCES))
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--trl-venv", type=Path, default=Path.home() / ".cache" / "kibitz" / f"trl-{VERSION}")
    made.add_argument("--without-trl", action="store_true")
    options = side_by_side.read(made, given)
    if options.tiny:
        options.vocab, options.hidden, options.tokens, options.divergences = 512, "16", "64", "reverse_kl"
    table, found = Table("loss", options), {}
    trl = None if options.without_trl else trl_python(options.trl_venv)
    if isinstance(trl, str):
        say(f"TRL's form is left out. {trl}")
        trl = None
    print(side_by_side.heading(table))
    for hidden in map(int, options.hidden.split(",")):
        for tokens in map(int, options.tokens.split(",")):
            for divergence in options.divergences.split(","):
                case = f"{divergence}, H {hidden}, {tokens} tokens"
                sizes = {"vocab": options.vocab, "hidden": hidden, "tokens": tokens, "checked": min(64, tokens)}
                every = sides(table, {"divergence": divergence, **sizes}, trl)
                for number in table.alternate(case, every, options.threads):
                    say(f"{case}: round {number + 1} of {options.rounds}")
                print(report(table, case) + "\n", flush=True)
                names = [name for name in (*FORMS, *options.sides) if name != OURS]
                found |= {f"{case}: {n}, {w}": s for n in names for w, s in pairs(table, case, n).items()}
                products = ratios(table, case, "products", seconds)
                found |= {f"{case}: products, time": products} if products is not None else {}
    side_by_side.settle(table, found)
    return table


if __name__ == "__main__":
    main()
