"""Shows what the benchmark found: a table, a comparison with an earlier run, a plot."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from griffin_jax.utils.figures import new_figure

FORMAT = "griffin_jax bench 1"
"""Format and version of the JSON object that a run prints and `read` reads."""

LABEL = 24
"""Least width of the column with the label of a row."""

Row = Mapping[str, Any]
Column = tuple[str, str, int, Callable[[Row], str]]
"""Two lines of heading, the width, and a function that gives the text of a row's cell."""


def read(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The result of an earlier run, from a file whose last line is the JSON object that the run printed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the last line of the file is not the result of a benchmark.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no earlier result {file}")
    lines = Path(file).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{file}: its last line is no JSON object of a benchmark ({FORMAT})")
    return found


def table(result: Mapping[str, Any]) -> str:
    """A table of the whole run, at most 120 columns wide."""
    layers = f"{result['layers']} layer{'s' * (result['layers'] > 1)}"
    random = ", random weights" if result["weights"] == "random" else ""
    peak = {"of the process": result["peak_memory"], "of the device": result["device_memory"]}
    memory = [f"{size(value)} {where}" for where, value in peak.items() if value is not None]
    lines = [
        f"{result['model']}: {layers}, {result['parameters'] / 1e6:,.1f} M parameters, {precision(result)}{random}",
        f"griffin_jax {result['griffin_jax']}, jax {result['jax']}, {result['backend']} ({result['device']}),"
        f" {result['threads']} CPU threads",
        f"medians of {result['repeats']} after a warm-up, all rows of a group in turn; bandwidth"
        f" {result['bandwidth'] / 1e9:.1f} GB/s" + (f"; peak memory {', '.join(memory)}" if memory else ""),
    ]
    if result["in_place"]:
        lines.append("one copy of the weights: kept rows and others in two groups, regrouped for every prompt")
    if result["mesh"]:
        sizes = ",".join(f"{axis}={size}" for axis, size in result["mesh"].items())
        lines.append(f"divided among the devices of --mesh {sizes}; bytes and the bandwidth are those of each")
    if result["round_to"] > 1:
        lines.append(f"kept neurons rounded up to a multiple of {result['round_to']}")
    for peer in result["peers"]:
        weights = f", weights of {peer['weights']}" if peer["weights"] else ""
        lines.append(f"peer: {peer['name']}, {peer['version']}{weights}")
    if result["peers"] and any(row["batch"] > 1 for row in result["rows"]):
        lines.append("peers are measured at batch 1 only")
    lines += [f"peer: {name} is skipped: {reason}" for name, reason in result["skipped"].items()]
    best, several, drafts = (any(row[name] for row in result["rows"]) for name in ("quality", "format", "drafts"))
    for rows in groups(result["rows"]):
        first = rows[0]
        lines += [
            "",
            f"{first['prompt']:,} prompt + {first['new']:,} new tokens, batch {first['batch']},"
            f" cache of {first['slots']:,} slots",
            *_block("request", REQUEST, rows),
            *_prunes(rows),
            "",
            *_block("decoding", DECODING, rows),
            *_drafting(rows),
            *_against_peers(rows),
        ]
    lines += [
        "",
        "statistic: what it adds to prefill. prune: into the memory of the answer before. steps: select and prune in"
        " decode",
        "steps. gather: bytes that prune reads and writes.",
        *(["best: --quality best. The statistic includes rows of the prompt, prune the refit to them."] * best),
        "ceiling: weights in use and all slots of the cache, over the bandwidth. allowed: bytes dense / bytes pruned.",
        *(["speed-up and allowed: against the dense model in the first format."] * several),
        *([DRAFTS] * drafts),
    ]
    return "\n".join(lines)


DRAFTS = (
    "speculative: the pruned model drafts, the full one decides. Bytes are for each token of the answer, drafts and\n"
    "passes together. Random prompts say little about how many drafts are accepted: griffin-jax eval drafts has texts."
)
"""Explains the bytes of speculative rows."""


def precision(result: Mapping[str, Any]) -> str:
    """The dtype in which the model computes, and the format of its matrices if that differs."""
    dtype, stored_as = result["dtype"], result.get("stored_as", result["dtype"])
    return dtype if stored_as == dtype else f"weights {stored_as} in {dtype}"


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in groups of the same lengths and batch size."""
    found: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["prompt"], row["new"], row["batch"]), []).append(row)
    return list(found.values())


def label(row: Row) -> str:
    """What distinguishes a row from others of the same density.

    The label names the row's system, or `best`, the format of its weights if there are several, what its batch keeps,
    and whether its model only drafts.
    """
    drafts = "speculative" if row.get("drafts") else None
    parts = row["quality"] or row["system"], row.get("format"), row["experts"], drafts
    return " ".join(filter(None, parts))


def size(value: int) -> str:
    """A number of bytes as MB or GB."""
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"


def _number(name: str, digits: int, factor: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        if row[name] is None:
            return "-"
        value = row[name] * factor
        # Columns are wide enough for 9,999.9.
        return f"{value:,.{digits if value < 1000 else min(digits, 1)}f}"

    return show


def _share(name: str, sign: str = "") -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else f"{row[name]:{sign}.{1 if sign else 0}%}"


def _times(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else f"{row[name]:.2f}x"


def _size(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else size(row[name])


def _steps(row: Row) -> str:
    return "-" if row["select_ms"] is None else f"{(row['select_ms'] + row['prune_ms']) / row['decode_ms']:.1f}"


def _density(row: Row) -> str:
    return f"{row['density']:g}"


REQUEST: tuple[Column, ...] = (
    ("density", "", 8, _density),
    ("compile", "s", 8, _number("compile_seconds", 1)),
    ("prefill", "ms", 9, _number("prefill_ms", 1)),
    ("statistic", "", 10, _share("statistic_share", "+")),
    ("select", "ms", 8, _number("select_ms", 2)),
    ("prune", "ms", 8, _number("prune_ms", 2)),
    ("steps", "", 6, _steps),
    ("gather", "GB/s", 8, _number("prune_speed", 1, 1e-9)),
    ("of band-", "width", 9, _share("prune_fraction")),
    ("1st token", "ms", 10, _number("first_token_ms", 1)),
    ("total", "ms", 10, _number("total_ms", 1)),
)
"""Columns for the phases of a request."""

DECODING: tuple[Column, ...] = (
    ("density", "", 8, _density),
    ("decode", "ms/token", 10, _number("decode_ms", 2)),
    ("tokens/s", "", 9, _number("tokens_per_second", 1)),
    ("weights", "", 9, _size("weights_bytes")),
    ("cache", "", 9, _size("cache_bytes")),
    ("read", "GB/s", 8, _number("read_speed", 1, 1e-9)),
    ("ceiling", "ms/token", 9, _number("ceiling_ms", 2)),
    ("of", "it", 5, _share("fraction_of_ceiling")),
    ("speed-", "up", 7, _times("speedup")),
    ("allowed", "", 8, _times("speedup_ceiling")),
    ("of", "it", 5, _share("fraction_of_speedup")),
    ("peak", "memory", 9, _size("peak_memory")),
)
"""Columns for decode steps, next to their ceiling."""

DRAFTING: tuple[Column, ...] = (
    ("density", "", 8, _density),
    ("drafts", "", 8, lambda row: str(row["drafts"])),
    ("drafted", "in", 9, lambda row: row["draft_weights"] or "own"),
    ("a draft", "", 10, _size("draft_bytes")),
    ("of a", "pass", 6, _share("draft_share")),
    ("accepted", "", 10, _share("accepted")),
    ("tokens", "a pass", 8, _number("tokens_per_pass", 2)),
    ("bytes", "a token", 10, _size("step_bytes")),
    ("of", "dense", 7, _number("bytes_share", 2)),
)
"""Columns for what drafts read, and what they are worth."""


def _drafting(rows: Sequence[Row]) -> list[str]:
    """The block of the rows that draft; empty if there are none."""
    found = [row for row in rows if row.get("drafts")]
    return ["", *_block("drafting", DRAFTING, found)] if found else []


def _block(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    heads = ["".join(f"{column[number]:>{column[2]}}" for column in columns) for number in (0, 1)]
    first = max([LABEL, *(len(label(row)) for row in rows)])
    lines = [f"{title:{first}}{heads[0]}", f"{'':{first}}{heads[1]}".rstrip()]
    for row in rows:
        lines.append(f"{label(row):{first}}" + "".join(f"{cell(row):>{width}}" for *_, width, cell in columns))
    return lines


def _prunes(rows: Sequence[Row]) -> list[str]:
    """Lines for those times of pruning that have no column."""
    lines = []
    for title, name, form in (
        ("the first prune, into memory that is new", "first_prune_ms", "{:,.1f} ms"),
        ("select and prune, of prefill", "overhead_share", "{:,.1%}"),
    ):
        found: dict[str, list[str]] = {}
        for row in rows:
            if row[name] is not None:
                found.setdefault(label(row), []).append(f"{form.format(row[name])} at {_density(row)}")
        named = len(found) > 1
        listed = "; ".join(f"{f'{system}: ' * named}{', '.join(values)}" for system, values in found.items())
        if found:
            lines += textwrap.wrap(f"{title}: {listed}", 120)
    return lines


def _against_peers(rows: Sequence[Row]) -> list[str]:
    ours = [row for row in rows if row["system"] == "griffin_jax" and not row["quality"] and not row["drafts"]]
    lines = []
    for row in rows:
        if row["system"] == "griffin_jax":
            continue
        for mine in ours:
            if mine["density"] != row["density"]:
                continue
            decode, prefill, total = (row[name] / mine[name] for name in ("decode_ms", "prefill_ms", "total_ms"))
            lines.append(
                f"{label(row)} at density {row['density']:g}: {decode:.2f}x as long as {label(mine)} to decode,"
                f" {prefill:.2f}x to prefill, {total:.2f}x in all"
            )
    return lines


COMPARED = {
    "compile_seconds": "compile", "prefill_ms": "prefill", "select_ms": "select", "prune_ms": "prune",
    "first_token_ms": "first", "decode_ms": "decode", "tokens_per_second": "tok/s", "total_ms": "total",
    "step_bytes": "bytes", "read_speed": "read/s", "speedup": "gain", "peak_memory": "memory",
}  # fmt: skip
"""Columns of a comparison."""

SETTINGS = (
    "model",
    "layers",
    "weights",
    "dtype",
    "stored_as",
    "backend",
    "device",
    "threads",
    "repeats",
    "round_to",
    "in_place",
    "mesh",
    "jax",
)
"""Settings that must be the same in two runs for their ratios to say something about the code."""


def comparison(now: Mapping[str, Any], before: Mapping[str, Any], name: str | os.PathLike[str]) -> str:
    """The ratio of every figure to that of an earlier run, and the settings in which the two runs differ.

    Rows are matched by system, density, batch, experts, quality, formats, drafts and lengths. If only the lengths of a
    row differ from those of a single earlier row, the two are compared, with a warning.

    Args:
        now: result of this run.
        before: result of the earlier run.
        name: name of the earlier run, for the heading.
    """
    warnings = [
        f"warning: {setting} was {before.get(setting)}, is {now.get(setting)}"
        for setting in SETTINGS
        if before.get(setting) != now.get(setting)
    ]
    ratio = now["bandwidth"] / before["bandwidth"]
    lines = []
    for rows in groups(now["rows"]):
        first = rows[0]
        lines += [
            "",
            f"{first['prompt']:,} prompt + {first['new']:,} new tokens, batch {first['batch']}",
            f"{'now / before':{LABEL}}{'density':>8}" + "".join(f"{COMPARED[c]:>{_width(c)}}" for c in COMPARED),
        ]
        for row in rows:
            title = f"{label(row)} at {row['density']:g}, {row['prompt']}+{row['new']}, batch {row['batch']}"
            other = _earlier(row, before["rows"])
            if other is None:
                warnings.append(f"warning: {title} was not measured before")
                other = {}
            elif (was := (other["prompt"], other["new"])) != (row["prompt"], row["new"]):
                warnings.append(f"warning: lengths of {title} were {was[0]}+{was[1]}")
            cells = (f"{_ratio(row.get(column), other.get(column)):>{_width(column)}}" for column in COMPARED)
            lines.append(f"{label(row):{LABEL}}{_density(row):>8}{''.join(cells)}")
    return "\n".join([
        f"compared with {name}; the bandwidth measured is {ratio:.2f}x what it was",
        *warnings,
        *lines,
    ])  # fmt: skip


def _width(column: str) -> int:
    return max(6, len(COMPARED[column])) + 1


def _ratio(now: float | None, before: float | None) -> str:
    if now is None or before is None:
        return "-"
    return f"{now / before:.2f}" if before else "-" if now else "1.00"


def _earlier(row: Row, rows: Sequence[Row]) -> Row | None:
    # Rows of older versions have no quality, no format and no drafts.
    told_by = ("system", "density", "batch", "experts", "quality", "format", "drafts", "draft_weights")
    same = [r for r in rows if all(r.get(n) == row.get(n) for n in told_by)]
    exact = [r for r in same if (r["prompt"], r["new"]) == (row["prompt"], row["new"])]
    return exact[0] if exact else same[0] if len(same) == 1 else None


def plot(result: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Draws a PNG of how decoding speeds up as the density falls, next to what the bytes allow.

    There is one panel for every pair of lengths, and one colour for every batch size (and what the batch keeps).

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    rows = [row for row in result["rows"] if row["speedup"] is not None]
    panels: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["prompt"], row["new"]), []).append(row)
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = new_figure(1.2 + 5.2 * across, 0.9 + 4.2 * down)
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flat
    for axis, ((prompt, new), members) in zip(axes, panels.items(), strict=False):
        for number, (name, line) in enumerate(_lines(members).items()):
            points = sorted(line, key=lambda row: row["density"])
            densities, colour = [row["density"] for row in points], f"C{number}"
            axis.plot(densities, [row["speedup"] for row in points], "o-", color=colour, label=name)
            allowed = [row["speedup_ceiling"] for row in points]
            axis.plot(densities, allowed, "--", color=colour, alpha=0.7)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.plot([], [], "--", color="grey", label="ceiling: bytes dense / bytes pruned")
        axis.set_xlabel("density (share of feed-forward neurons kept)")
        axis.set_ylabel("speed-up of decoding (times dense)")
        axis.set_title(f"{prompt:,} prompt + {new:,} new tokens")
        axis.set_xlim(1.03, 0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in list(axes):
        axis.set_visible(False)
    device = f"{result['backend']} ({result['threads']} threads)" if result["backend"] == "cpu" else result["device"]
    figure.suptitle(
        f"{result['model']}, {result['layers']} layers, {precision(result)}, {device},"
        f" {result['bandwidth'] / 1e9:.0f} GB/s"
    )
    figure.savefig(file, format="png")


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows on each line of a plot, by the name of the line.

    The dense row begins every line of its system and batch, except lines of drafts, where the model that drafts may be
    dense, too.
    """
    full = [row for row in rows if row["density"] == 1 and not row.get("drafts")]
    dense = {(row["system"], row["batch"], row.get("format")): row for row in full}
    found: dict[str, list[Row]] = {}
    for row in rows:
        drafts = "speculative" if row.get("drafts") else None
        if row["density"] < 1 or drafts:
            parts = (
                (row["system"], row["quality"], row.get("format"), drafts),
                (f"batch {row['batch']}", row["experts"]),
            )
            name = ", ".join(" ".join(filter(None, part)) for part in parts)
            # The first of two formats is that of the dense row, which names no format if all rows have the same.
            own = (row.get("format") or "").partition("+")[0]
            starts = [dense.get((row["baseline"], row["batch"], name)) for name in (own or None, None)]
            start = None if drafts else next(filter(None, starts), None)
            found.setdefault(name, [] if start is None else [start]).append(row)
    return found
