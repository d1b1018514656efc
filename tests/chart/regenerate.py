"""Writes what is made from the chart and kept: presets, README.md, golden renders, alerts. ``make chart-golden``."""

from tests.chart.presets import QUESTIONS, preset_text
from tests.chart.rendering import CHART


def main() -> None:
    for name in QUESTIONS:
        (CHART / f"values-{name}.yaml").write_text(preset_text(name))
    # Read the presets just written.
    from tests.chart.golden_cases import CASES, FOLDER, golden_text
    from tests.chart.readme import README, current_readme
    from tests.deploy.alerts import ALERTS, alerts_text

    README.write_text(current_readme())
    for name, values in CASES.items():
        (FOLDER / f"{name}.yaml").write_text(golden_text(values))
    ALERTS.write_text(alerts_text())


if __name__ == "__main__":
    main()
