"""Energy of a run, measured by CodeCarbon."""

import csv
from importlib.util import find_spec

import pytest

from commands import assert_config_error, assert_success, metrics

ENERGY = ("callbacks=[checkpoint,energy]", "callbacks.energy.measure_every=1")


@pytest.mark.skipif(find_spec("codecarbon") is not None, reason="CodeCarbon is installed")
def test_a_missing_package_is_reported_before_anything_is_written(user):
    done = user.train(*ENERGY, "callbacks.energy.country_iso_code=DEU")
    assert_config_error(done, "callbacks.energy needs the codecarbon package: pip install '.[codecarbon]'")
    assert not (user.folder / "outputs").exists()


@pytest.mark.skipif(find_spec("codecarbon") is None, reason="CodeCarbon is not installed")
class TestWithCodeCarbon:
    def test_energy_is_that_of_codecarbons_file_and_accumulates_over_a_resume(self, user):
        pair = ("trainer=ddp", "trainer.devices=2")
        assert_success(user.train(*ENERGY, *pair, "callbacks.energy.country_iso_code=DEU"))
        directory = user.only_run()
        assert_success(user.python("gptlab.train", f"resume={directory}", "train.max_steps=9"))
        with (directory / "emissions.csv").open(newline="") as file:
            starts = [(float(row["energy_consumed"]), float(row["emissions"])) for row in csv.DictReader(file)]
        assert len(starts) == 2  # one process of each start measured
        energy, emissions = (metrics(directory, name) for name in ("energy_kwh", "emissions_kg"))
        assert energy.keys() == emissions.keys() == {3, 6, 9}
        assert 0 < energy[3] < energy[6] < energy[9]
        # the file also has what was used after the last evaluation
        assert energy[9] == pytest.approx(sum(start[0] for start in starts), rel=0.5)
        assert emissions[9] / energy[9] == pytest.approx(starts[0][1] / starts[0][0], rel=1e-3)  # kg per kWh of Germany

    def test_an_unknown_country_is_reported_before_anything_is_written(self, user):
        done = user.train(*ENERGY, "callbacks.energy.country_iso_code=DE")
        assert_config_error(done, "callbacks.energy.country_iso_code=DE is not a country")
        assert not (user.folder / "outputs").exists()
