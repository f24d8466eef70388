"""`page_of`: one self-contained HTML page with the table, the plots and the facts of runs."""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from megatron_muloco.config import derive
from tools.comparing.courses import Course
from tools.comparing.table import Comparison

__all__ = ["page_of"]

# Ten colours that differ, then the same with other strokes: more runs than that are not readable.
_STROKES = ("-", "--", ":", "-.")
_COLOURS = 10

# The first part of a run would set the scale of the loss.
_SHOWN_FROM = 0.1

_FEW_POINTS = 30  # so few are marked


@dataclass(frozen=True)
class _Plot:
    """A plot of all runs.

    Attributes:
        name: Anchor in the page.
        title: Heading.
        x_label: What the x axis is, with its unit.
        axis: Run -> inner step -> x.
        points: Run -> loss by inner step.
        unit: Unit at the ticks of x, with a prefix.
        log: Whether x is logarithmic.
        caption: What to know when reading it.
    """

    name: str
    title: str
    x_label: str
    axis: Callable[[Course], Callable[[float], float]]
    points: Callable[[Course], list[tuple[int, float]]] = lambda course: course.losses
    unit: str = ""
    log: bool = False
    caption: str = ""


_PLOTS = (
    _Plot("tokens", "Held-out loss over tokens", "tokens of all replicas", lambda c: c.tokens),
    _Plot(
        "time",
        "Held-out loss over training time",
        "training time (without evaluation and saving)",
        lambda c: c.seconds,
        unit="s",
        caption="Times are of the machines that the runs had; other work on them counts.",
    ),
    _Plot(
        "bytes",
        "Held-out loss over bytes sent",
        "bytes sent per rank",
        lambda c: c.bytes_sent,
        unit="B",
        log=True,
        caption="Between replicas as measured, inside a replica as planned.",
    ),
    _Plot(
        "training",
        "Training loss over tokens",
        "tokens of all replicas",
        lambda c: c.tokens,
        points=lambda c: c.training_losses,
        caption="Of the local parameters, in the mean over replicas; not comparable between "
        "methods, as the anchor is what is kept.",
    ),
)

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child { text-align: left; font-weight: 500; white-space: pre; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
.warning { border-left: 4px solid #c77700; padding: .25rem .75rem; background: #fff7ea; }
code { font-size: .9em; }
"""


def page_of(comparison: Comparison, warnings: Sequence[str]) -> str:
    """Return the page: it loads nothing, and its plots are SVG."""
    courses = comparison.courses
    parts = [
        "<h1>Comparison of runs</h1>",
        *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings),
        _table([course.name for course in courses], list(comparison.rows()), "comparison"),
        "<p>Losses are in nats per token; between two evaluations they are on a line. DP is data "
        "parallelism of the same model and batch on the same ranks.</p>",
        *(_section(plot, courses) for plot in _PLOTS),
        "<h2>Runs</h2>",
        _table([course.name for course in courses], _facts(courses), "runs"),
    ]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Comparison of runs</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def _table(names: Sequence[str], rows: Sequence[tuple[str, list[str]]], name: str) -> str:
    head = "".join(f"<th>{html.escape(each)}</th>" for each in ["", *names])
    body = "\n".join(
        f"<tr><th>{html.escape(label)}</th>"
        + "".join(f"<td>{html.escape(text)}</td>" for text in cells)
        + "</tr>"
        for label, cells in rows
    )
    return (
        f'<div class="wide"><table id="{name}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _facts(courses: Sequence[Course]) -> list[tuple[str, list[str]]]:
    """Return what identifies the runs."""

    def each(of: Callable[[Course], object]) -> list[str]:
        return [str(of(course)) for course in courses]

    return [
        ("parameters", each(lambda c: f"{derive(c.config).parameters.total:,}")),
        ("inner lr", each(lambda c: f"{c.config.inner.lr:g}")),
        ("seed", each(lambda c: c.config.training.seed)),
        ("device", each(lambda c: c.run.facts.get("device", "n/a"))),
        ("commit", each(lambda c: c.run.facts.get("commit", "n/a"))),
        ("config digest", each(lambda c: c.config.digest())),
        ("points", each(lambda c: c.run.source)),
    ]


# ---- plots ---------------------------------------------------------------------------------------


def _section(plot: _Plot, courses: Sequence[Course]) -> str:
    drawn, is_cut = _svg(plot, courses)
    cut = "The start of the runs is above the axis." if is_cut else ""
    caption = html.escape(" ".join(filter(None, (cut, plot.caption))))
    return (
        f'<h2>{plot.title}</h2>\n<figure id="{plot.name}">\n'
        f"{drawn or '<p>n/a: no run has points here.</p>'}\n"
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _svg(plot: _Plot, courses: Sequence[Course]) -> tuple[str, bool]:
    """Return the plot as inline SVG, empty without points, and whether losses are above it."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    losses = [_draw(axes, plot, course, place) for place, course in enumerate(courses)]
    later = [loss for _, after in losses for loss in after]
    if not later:
        return "", False
    top = max(later) * 1.01
    axes.set_ylim(top=top)
    if plot.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(plot.unit))
    axes.set(xlabel=plot.x_label, ylabel="loss, nats per token")
    axes.grid(color="#e5e5e5")
    axes.legend(frameon=False)
    stream = io.StringIO()
    # Text stays text, and ids do not depend on the time, so that equal runs give equal pages.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return _own_ids(text[text.index("<svg") :], plot.name), any(
        loss > top for everything, _ in losses for loss in everything
    )


def _own_ids(svg: str, prefix: str) -> str:
    """Prefix the ids of a drawing: several in one page would share them."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    return re.sub(r"url\(#", f"url(#{prefix}-", svg)


def _draw(axes: Axes, plot: _Plot, course: Course, place: int) -> tuple[list[float], list[float]]:
    """Draw one run; return its losses, and those after its first part."""
    axis = plot.axis(course)
    points = [(axis(step), step, loss) for step, loss in plot.points(course)]
    points = [point for point in points if point[0] > 0 or (point[0] == 0 and not plot.log)]
    begin = _SHOWN_FROM * course.last_step
    losses = [loss for _, _, loss in points]
    axes.plot(
        [x for x, _, _ in points],
        losses,
        marker="o" if len(points) < _FEW_POINTS else "",
        markersize=4,
        color=f"C{place % _COLOURS}",
        linestyle=_STROKES[place // _COLOURS % len(_STROKES)],
        label=f"{course.name}: {course.method}",
    )
    return losses, [loss for _, step, loss in points if step >= begin]
