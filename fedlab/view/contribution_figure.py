"""A figure of what each site has contributed."""

from __future__ import annotations

from fedlab.evidence.contributions import Contributions
from fedlab.view.style import ARMS, Picture, styled

__all__ = ["contributions_figure"]


def contributions_figure(found: Contributions, *, metric: str = "Dice") -> Picture:
    """Shapley values as bars with their standard errors, leave-one-out as marks; a row a site, the largest on top.

    Args:
        found: by `fedlab.evidence.contributions.site_contributions`.
        metric: what its utility measures.

    Raises:
        ValueError: there is no site.
    """
    if found.table.empty:
        raise ValueError("there is no site to draw")
    table = found.table.sort_values("shapley")
    with styled():
        figure = Picture(figsize=(8, 1.5 + 0.36 * len(table)), layout="constrained")
        ax = figure.subplots()
        rows = range(len(table))
        errors = table["standard error"].to_numpy()
        ax.barh(rows, table["shapley"], color=ARMS["federated"], height=0.6, label="Shapley value",
                xerr=errors if errors.any() else None, error_kw={"ecolor": "#222222", "capsize": 3})
        ax.plot(table["leave one out"], rows, "D", color=ARMS["local"], markersize=6, label="leave one out")
        ax.axvline(0, color="#888888", linewidth=0.8)
        ax.set_yticks(rows, [str(name) for name in table.index])
        ax.set_xlabel(f"{metric} that a site's updates add")
        ax.set_title(f"From {found.nobody:.3f} to {found.everybody:.3f}: who brought it")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    total = found.everybody - found.nobody
    figure.alt = (f"Shapley values of {len(table)} sites, which add up to {total:.3f} {metric}. "
                  + " ".join(f"{name} {value:.3f}." for name, value in table["shapley"][::-1].items()))
    return figure
