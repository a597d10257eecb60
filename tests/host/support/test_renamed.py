"""Old names still work, and say what they are called now."""

import importlib
import subprocess
import sys
import warnings

import numpy as np
import pytest

import kvattic
from kvattic.array import open_array
from kvattic.support.renamed import renamed_keywords

QUERY = np.ones((2, 1, 32))
OLD = {"mode": "fetched", "channels": 4, "units": 3, "local": 2, "unit": 8}
NEW = {"mode": "fetched", "features": 4, "top_units": 3, "local_tokens": 2, "unit_tokens": 8}


def fill(sequence):
    rng = np.random.default_rng(1)
    sequence.prefill(*rng.standard_normal((2, 2, 400, 32)))
    return sequence


@pytest.mark.parametrize("open_one", [lambda: kvattic.open("model", "tiny"), lambda: open_array(["model"], "tiny")],
                         ids=["device", "array"])
@pytest.mark.parametrize("call", ["attend", "attend_async", "plan"])
def test_old_keywords_of_a_selection_give_the_same_result_and_warn(open_one, call):
    with open_one() as device:
        sequence = fill(device.create_sequence(2, capacity_tokens=400, sparse=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new = getattr(sequence, call)(QUERY, **NEW)
        with pytest.warns(DeprecationWarning, match="is now") as caught:
            old = getattr(sequence, call)(QUERY, **OLD)
        assert sorted(str(warning.message).partition(";")[0] for warning in caught) == [
            "channels is now features", "local is now local_tokens", "unit is now unit_tokens",
            "units is now top_units"]
        assert {warning.filename for warning in caught} == {__file__}
        if call == "plan":
            old, new = (device.attend_many([plan])[0] for plan in (old, new))
        elif call == "attend_async":
            old, new = old.result(), new.result()
        assert np.array_equal(old.bits, new.bits)


def test_both_names_of_a_keyword_are_refused():
    function = renamed_keywords(old="new")(lambda *, new=0: new)
    assert function(new=1) == 1
    with pytest.raises(TypeError, match="got new and its old name old"):
        function(new=1, old=2)


def test_modules_under_old_names_are_the_new_ones():
    with pytest.warns(DeprecationWarning, match=r"kvattic\.sparse is now kvattic\.golden\.sparse"):
        old = importlib.import_module("kvattic.sparse")
    assert old is importlib.import_module("kvattic.golden.sparse")


def test_an_old_module_is_an_attribute_of_its_package():
    program = ("import warnings, kvattic; warnings.simplefilter('error', DeprecationWarning)\n"
               "try: kvattic.elements\n"
               "except DeprecationWarning as error: print(error)\n"
               "warnings.simplefilter('ignore'); import kvattic.spec.elements as new; print(kvattic.elements is new)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "kvattic.elements is now kvattic.spec.elements; the old name goes with version 0.4", "True"]


def test_what_a_package_never_had_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'kvattic' has no attribute 'nothing'"):
        _ = kvattic.nothing
