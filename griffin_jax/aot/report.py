"""The report of `griffin-jax compile` as text: what was found about a model on a chip."""

from __future__ import annotations

from collections.abc import Sequence

from griffin_jax.aot.compilation import Compiled, Report
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.model.sharding import HEADS, VOCABULARY, tile_missed
from griffin_jax.model.weights import Precision, WeightFormat


def table(model: str, report: Report) -> str:
    """Format a report as a table with notes.

    Args:
        model: the name by which the text calls the model.
        report: what compiling showed.
    """
    chip, columns = report.chip, [c for c in (report.dense, report.pruned) if c is not None]
    figures = f"{_size(chip.memory)}, {chip.bandwidth / 1e9:,.0f} GB/s"
    several = report.devices > 1
    precision = Precision.of(report.dtype, WeightFormat.parse(report.weights))
    lines = [
        f"{model} on {report.devices} x {chip.name} (each {figures}), compiled without them:"
        if several
        else f"{model} on {chip.name} ({figures}), compiled without it:",
        f"{precision}, batch {report.batch}, prompt {report.prompt:,} + {report.new:,} new tokens,"
        f" cache of {report.slots:,} slots, {report.layers} layer{'s' * (report.layers > 1)}"
        + (f", experts of {report.groups} groups" if report.groups > 1 else ""),
        _row("", [f"density {_densities(report.density)}" if c is report.pruned else "dense" for c in columns]),
        _row("neurons kept of each layer", [_span(c.kept) for c in columns]),
        *_in_few_bits(report, columns),
        _row("weights", [_size(c.weights) for c in columns]),
        _row("cache", [_size(report.cache) for _ in columns]),
        _row("temporaries of decoding", [_size(c.temporaries) for c in columns]),
    ]
    for phase in (report.pruned or report.dense).memory:
        held = [_size(c.memory[phase]) if phase in c.memory else "-" for c in columns]
        lines.append(_row(f"all memory, {phase}", held))
    lines += [
        _row("fits", ["yes" if c.fits else "NO" for c in columns]),
        _row("read, each step", [_size(c.step_bytes) for c in columns]),
        _row("kernels, each step" if chip.gpu else "operations, each step", [_count(c) for c in columns]),
        _row("FF weights copied, each step", [_copies(c.ff_copies_per_step, c.ff_copies_per_call) for c in columns]),
        _row("cache copied, each step", [_copies(c.cache_copies_per_step, c.cache_copies_per_call) for c in columns]),
        *(_communication(report, columns) if several else ()),
        _row("ceiling, tokens/s", [f"{c.ceiling:,.1f}" for c in columns]),
    ]
    if report.speedup_ceiling is not None:
        lines.append(_row("ceiling of the speed-up", ["", f"{report.speedup_ceiling:.2f}x"]))
    if report.round_bytes is not None and report.speculative is not None:
        worth, most = report.round_bytes / report.dense.step_bytes, report.speculative + 1
        lines.append(
            f"A round of {report.speculative} drafts reads {_size(report.round_bytes)} for 1 to {most} tokens: less"
            f" than dense decoding for more than {worth:.2f}."
        )
    if report.masked:
        formats = "" if report.mixed is None else ", in both formats"
        lines.append(
            f"{report.batch} sequences keep as many neurons together as there are: each step reads all of them"
            f" once{formats}, with a mask for each sequence."
        )
    lines += [f"not compiled: {refusal}" for refusal in report.refusals]
    tile = _tile_missed(report)
    if chip.gpu and report.pruned and report.pruned.ff_copies_per_step and tile:
        tiles = tile * report.devices
        lines.append(
            f"Where the kept neurons{' of a device' * several} are no multiple of {tile}, XLA pads or joins"
            f" matrices at every step: --round-to {tiles} avoids that."
        )
    lines += [_REPLICATED[what].format(report.devices) for what in report.replicated]
    if report.kv_copies > 1:
        lines.append(f"Each key/value head is there {report.kv_copies} times, so that the devices can share attention.")
    if report.expert_parallel:
        lines.append("Devices have whole experts each: all that a token chooses may be experts of one device.")
    if several:
        counted = "kernels" if chip.gpu else "operations"
        lines.append(f"Bytes and {counted} are those of each device. Ceilings do not count communication.")
    lines += [
        "Ceilings are the published bandwidth over the bytes read at each step: computed, not measured.",
        "All memory: the full model stays, next to what is pruned from it, to read the next prompt.",
    ]
    return "\n".join(lines)


_REPLICATED = {
    HEADS: "Attention and the cache are not divided: {} devices cannot share the key/value heads evenly.",
    VOCABULARY: "Embedding and head are not divided: {} devices cannot share the vocabulary evenly.",
}


def _tile_missed(report: Report) -> int:
    """The rows of a tile if the kept neurons on a device are no multiple of them; 0 if they are."""
    if report.pruned is None:
        return 0
    own = WeightFormat.parse(report.weights)
    counts = [(own, report.pruned.precise)]
    if report.mixed is not None:
        formats = MixedFormat.parse(report.mixed)
        assert isinstance(formats, MixedFormat)
        counts.append((formats.coarse, report.pruned.few_bits))
    return tile_missed(counts, report.devices)


def _in_few_bits(report: Report, columns: Sequence[Compiled]) -> list[str]:
    """A row with the number of kept neurons in the second format; no row if there is one format."""
    if report.mixed is None:
        return []
    _, _, others = report.mixed.partition("+")
    cells = [_span(c.few_bits) if c.few_bits else "-" for c in columns]
    return [_row(f"of these in {others.partition('@')[0]}", cells)]


def _communication(report: Report, columns: Sequence[Compiled]) -> list[str]:
    """Rows that say how often the devices communicate in each layer, outside the layers and in `prune`, one for each
    kind, and how many bytes."""
    rows = []
    for title, counts, share in (
        ("each layer", [c.collectives_in_layers for c in columns], report.layers),
        ("outside the layers", [c.collectives_elsewhere for c in columns], 1),
        ("prune", [c.collectives_in_prune if c is report.pruned else {} for c in columns], 1),
    ):
        kinds = sorted({kind for count in counts if count for kind in count})
        for kind in kinds:
            cells = ["refused" if count is None else f"{count.get(kind, 0) / share:,.6g}" for count in counts]
            rows.append(_row(f"{kind}, {title}", cells))
    rows.append(_row("communicated, each step", [_size(c.communicated_per_step) for c in columns]))
    if report.pruned is not None:
        rows.append(_row("communicated, prune", ["-", _size(report.pruned.communicated_in_prune)]))
    return rows


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:29}" + "".join(f"{cell:>16}" for cell in cells)


def _size(size: int | None) -> str:
    if size is None:
        return "refused"
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _span(kept: Sequence[int]) -> str:
    low, high = min(kept), max(kept)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _densities(density: float | Sequence[float]) -> str:
    if not isinstance(density, Sequence):
        return f"{density:g}"
    low, high = min(density), max(density)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _count(compiled: Compiled) -> str:
    return "refused" if compiled.kernels_per_step is None else f"{compiled.kernels_per_step:,}"


def _copies(per_step: Sequence[str] | None, per_call: Sequence[str] | None) -> str:
    if per_step is None or per_call is None:
        return "refused"
    return f"{len(per_step)}" + (f" (+{len(per_call)} once)" if per_call else "")
