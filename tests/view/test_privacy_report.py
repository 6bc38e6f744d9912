"""Privacy spent is drawn and printed beside the accuracy, always with its definition."""

from __future__ import annotations

import pytest
from test_report import Page

from fedlab.core.types import Round, ServerState, Spent
from fedlab.run.history import History
from fedlab.view.report_page import privacy_section, write_report
from fedlab.view.run_figures import privacy_curves


def spent(epsilon: float, unit: str = "site") -> Spent:
    return Spent(epsilon=epsilon, delta=1e-3, unit=unit, accountant="rdp", adjacency=f"any two updates of a {unit}")


def history(*, rounds: int = 4, units: tuple[str, ...] = ("site",), private: bool = True) -> History:
    """Site b spends twice as much as site a and is absent in the last round."""
    made = History(rounds=rounds, privacy="LocalGaussian(clip=1.0)" if private else "Privacy()")
    for number in range(rounds):
        sites = ("a", "b") if number < rounds - 1 else ("a",)
        paid = {site: tuple(spent((number + 1) * (2.0 if site == "b" else 1.0), unit) for unit in units)
                for site in sites} if private else {}
        made.add(Round(number=number, state=ServerState(round=number + 1, params={}), cohort=sites,
                       sites={site: {"weight": 1.0, "bytes": 8.0} for site in sites}, spent=paid,
                       metrics={"Dice": 0.2 * (number + 1)}, seconds=1.0))
    return made


def lines(ax) -> dict[str, list[float]]:
    return {str(line.get_label()): [float(y) for y in line.get_ydata()] for line in ax.get_lines()}


def test_every_site_is_drawn_with_the_budget_and_what_the_epsilon_means():
    figure = privacy_curves(history(), budget=9.0)
    left, right = figure.axes
    drawn = lines(left)
    assert drawn["b, most"] == [2.0, 4.0, 6.0, 6.0]  # spending never decreases
    assert drawn["other sites"] == [1.0, 2.0, 3.0, 4.0] and drawn["budget 9"] == [9.0, 9.0]
    for words in ("δ = 0.001", "any two updates of a site", "rdp accountant"):
        assert words in left.get_xlabel() and words in figure.alt
    assert left.get_title(loc="left") == "ε per site, spent so far" and left.get_ylim()[1] > 9
    assert list(lines(right).values()) == [pytest.approx([0.2, 0.4, 0.6, 0.8])]
    assert "rises to 6 at b, the budget is 9." in figure.alt and "Dice ends at 0.80." in figure.alt


def test_units_have_panels_of_their_own_and_a_missing_metric_has_none():
    assert [ax.get_title(loc="left") for ax in privacy_curves(history(units=("patient", "site"))).axes] == [
        "ε per patient, spent so far", "ε per site, spent so far", "Dice of the model"]
    assert len(privacy_curves(history(), metric="HD95").axes) == 1


def test_without_a_guarantee_there_is_nothing_to_draw_and_the_report_says_so(tmp_path):
    plain = history(private=False)
    with pytest.raises(ValueError, match="no formal guarantee"):
        privacy_curves(plain)
    page = Page(write_report(tmp_path / "report.html", title="t", lead="l", sections=[privacy_section(plain)]
                             ).read_text("utf-8"))
    assert "No formal guarantee" in page.text and "ε =" not in page.text and not page.all("img")


def test_the_report_shows_epsilon_beside_dice(tmp_path):
    section = privacy_section(history(), budget=9.0)
    assert list(section.table.columns) == ["Dice", "ε per site, a", "ε per site, b"]
    assert section.table["ε per site, b"].tolist() == [2.0, 4.0, 6.0, 6.0]
    assert section.table["Dice"].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    page = Page(write_report(tmp_path / "report.html", title="t", lead="l", sections=[section]).read_text("utf-8"))
    for words in ("ε = 6 at δ = 0.001 per site (any two updates of a site, rdp accountant) at b",
                  "LocalGaussian(clip=1.0)", "ε per site, a"):
        assert words in page.text
    assert len(page.all("img")) == 1


def test_long_runs_leave_rounds_out_but_not_the_last():
    table = privacy_section(history(rounds=40)).table
    assert len(table) == 12 and table.index[0] == 0 and table.index[-1] == 39


def test_a_stopped_run_says_why():
    stopped = history()
    stopped.stopped = "no site is left: <b>"
    assert "ended early: no site is left" in privacy_section(stopped).text


def test_a_table_shows_no_epsilon_smaller_than_it_is(tmp_path):
    made = History(rounds=1, privacy="x")
    made.add(Round(number=0, state=ServerState(round=1, params={}), cohort=("a",), metrics={"Dice": 0.5}, seconds=1.0,
                   sites={"a": {"weight": 1.0, "bytes": 8.0}}, spent={"a": (spent(2.0004),)}))
    section = privacy_section(made)
    assert section.table["ε per site, a"].tolist() == [2.0004]
    page = write_report(tmp_path / "report.html", title="t", lead="l", sections=[section]).read_text(encoding="utf-8")
    assert "2.001" in page and "2.000" not in page
