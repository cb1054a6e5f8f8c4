from __future__ import annotations

from dataclasses import replace

import pytest

from medcompile.search.cost import CostModel, assumed, fitted, scaled
from medcompile.search.line import Option, hull, line
from medcompile.search.looks import at_looks, error_to_pass, promising
from medcompile.search.menu import format_of, menus
from medcompile.search.record import read, write
from medcompile.spec import Margin, Target, Variant, Verdict
from tests.search.planted import PlantedBench, searcher

GOOD = {f"layer.{i}": 0.0005 for i in range(12)}


def test_a_model_that_int8_does_not_hurt_gets_int8_everywhere() -> None:
    found = searcher(PlantedBench(GOOD)).run()
    chosen = found.point(found.chosen)
    assert chosen.formats == {"int8": 12}
    assert chosen.cost == 2 + 12 * 0.5
    assert [look.accepted for look in found.looks] == [True]


def test_a_planted_bad_layer_is_kept_from_int8_and_named() -> None:
    bench = PlantedBench({**GOOD, "layer.7": 0.3})
    found = searcher(bench).run()
    bad = next(c for c in found.layers if c.nodes == ("layer.7/MatMul",))
    assert bad.format == "float"
    assert "int8" in bad.why and "30.00%" in bad.why
    assert {c.format for c in found.layers if c is not bad} == {"int8"}
    assert bench.drop(found.point(found.chosen).variant) < 0.02


def test_a_layer_that_only_weights_alone_spare_gets_that_format() -> None:
    found = searcher(PlantedBench({**GOOD, "layer.7": 0.03})).run()
    bad = next(c for c in found.layers if c.nodes == ("layer.7/MatMul",))
    assert bad.format == "int8-weights"
    assert {a.format: a.cost for a in bad.alternatives} == pytest.approx({"float": 0.2, "int8": -0.3})


def test_a_format_that_the_target_refuses_is_left_out_and_said() -> None:
    found = searcher(PlantedBench(GOOD, refused=("int8",))).run()
    assert found.point(found.chosen).formats == {"int8-weights": 12}
    assert any("int8 is left out" in note for note in found.notes)


def test_the_acceptance_data_is_looked_at_no_more_often_than_allowed() -> None:
    bench = PlantedBench(dict.fromkeys(GOOD, 0.2), items={"tuning": 2000, "acceptance": 40})
    found = searcher(bench, looks=2).run()
    assert not found.chosen and len(found.looks) <= 2 == found.most_looks
    assert bench.judged.count("acceptance") == len(found.looks)


def test_no_more_points_are_judged_than_allowed() -> None:
    bench = PlantedBench({f"layer.{i}": 0.02 + i / 100 for i in range(40)})
    searcher(bench, points=3).run()
    assert bench.judged.count("tuning") == 3


def test_a_whole_format_that_was_measured_cheaper_than_the_model_had_it_is_judged_too() -> None:
    class Surprising(PlantedBench):
        """A mixture costs more than its parts."""

        def cost(self, variant: Variant) -> dict[str, float]:
            found = dict(super().cost(variant))
            mixed = len({self.format(name, variant) for name in self.errors_of}) > 1
            return {graph: cost + 4.0 * mixed for graph, cost in found.items()}

    found = searcher(Surprising({**GOOD, "layer.7": 0.03})).run()
    assert found.point(found.chosen).formats == {"int8-weights": 12}


def test_where_not_even_float_could_be_shown_to_pass_nothing_between_is_judged() -> None:
    bench = PlantedBench(GOOD, items={"tuning": 100, "acceptance": 50}, margins=(Margin("accuracy", 0.005),))
    found = searcher(bench).run()
    assert not found.chosen
    assert bench.judged.count("tuning") == 2
    assert any("not even float, which" in note for note in found.notes)


def test_quick_evidence_is_that_of_the_whole_evaluation() -> None:
    for seed in range(20):
        benches = [PlantedBench(GOOD, seed=seed, true_drop=0.01, noise=0.01, quick=quick) for quick in (False, True)]
        found = [searcher(bench).run() for bench in benches]
        ((one,), (other,)) = (look.evidence for look in (f.looks[0] for f in found))
        assert (one.verdict, one.difference, one.lower, one.interval) == (
            other.verdict,
            other.difference,
            other.lower,
            other.interval,
        )
        assert [p.passed for p in found[0].points] == [p.passed for p in found[1].points]


def test_a_look_that_can_be_spared_goes_to_what_tuning_data_refused_by_little() -> None:
    """The text of the tuning data is a hundred items, by whose chance int8 everywhere was refused; it loses nothing."""
    bold = modest = 0
    for seed in range(30):
        found = searcher(PlantedBench(GOOD, {"tuning": 300, "acceptance": 4000}, seed=seed, true_drop=0.0, noise=0.02))
        record = found.run()
        refused = record.points and next(p for p in record.points if p.formats == {"int8": 12}).passed is False
        if refused and record.chosen:
            bold += record.point(record.chosen).formats == {"int8": 12}
            modest += record.point(record.chosen).formats != {"int8": 12}
    assert bold > modest


def test_nothing_is_risked_where_there_is_one_look_alone() -> None:
    for seed in range(10):
        bench = PlantedBench(GOOD, {"tuning": 300, "acceptance": 4000}, seed=seed, true_drop=0.0, noise=0.02)
        record = searcher(bench, looks=1).run()
        assert not any("looked at first" in note for note in record.notes)


def test_each_look_has_the_confidence_that_all_looks_together_need() -> None:
    (margin,) = at_looks([Margin("f1", 0.01, 0.95)], 3)
    assert margin.confidence == pytest.approx(1 - 0.05 / 3)


def test_a_point_is_promising_only_if_the_acceptance_data_could_show_it() -> None:
    bench = PlantedBench(GOOD, items={"tuning": 2000, "acceptance": 2000})
    variant = searcher(bench).menus[0].mixture("v", dict.fromkeys(bench.groups(), "int8"), {"int8": _int8()})
    evidence = bench.tuning(variant)
    assert promising(evidence, 1.0) == ""
    assert "would not be shown" in promising(evidence, 0.01)


def test_where_the_target_is_elsewhere_costs_come_from_the_model_and_nothing_is_timed() -> None:
    bench = PlantedBench(GOOD, here=False)
    model = CostModel({"classify": 1.0}, {"classify": {"int8": -0.5, "int8-weights": -0.1}}, "fitted elsewhere")
    found = searcher(bench, elsewhere=model).run()
    assert found.basis == "fitted elsewhere"
    chosen = found.point(found.chosen)
    assert chosen.cost is None and chosen.predicted == pytest.approx(0.5)


def test_the_record_is_read_as_it_was_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = searcher(PlantedBench({**GOOD, "layer.7": 0.3})).run()
    write(tmp_path / "search.json", (found,))
    assert read(tmp_path / "search.json") == (found,)


def test_the_hull_drops_what_costs_more_and_loses_more() -> None:
    options = [Option("a", 0, 0.3), Option("b", 1, 0.4), Option("c", 2, 0.1), Option("d", 3, 0.0), Option("e", 9, 0.0)]
    assert [o.format for o in hull(options)] == ["a", "c", "d"]


def test_the_line_first_moves_what_removes_most_error_for_its_cost() -> None:
    options = {
        ("big",): [Option("float", 4, 0.0), Option("int8", 0, 0.2)],
        ("small",): [Option("float", 1, 0.0), Option("int8", 0, 0.2)],
        ("harmless",): [Option("float", 1, 0.0), Option("int8", 0, 0.001)],
    }
    moved = [{g[0] for g, f in a.items() if f == "float"} for a in line(options)]
    assert moved == [set(), {"small"}, {"small", "big"}, {"small", "big", "harmless"}]


def test_the_cost_model_takes_a_layers_share_of_what_the_whole_changes_by() -> None:
    whole = [({"g": {"float": 1.0}}, {"g": 10.0}), ({"g": {"int8": 1.0}}, {"g": 4.0})]
    model = fitted(whole, "here")
    assert model.predict({"g": {"float": 0.5, "int8": 0.5}}) == pytest.approx(7.0)
    assert scaled(model, ["other"]).predict({"other": {"int8": 1.0}}) == pytest.approx(0.4)


def test_assumptions_are_told_as_such() -> None:
    model = assumed(["g"], ["float", "int8", "int4-g128"])
    assert model.basis.startswith("assumed")
    assert model.predict({"g": {"int8": 1.0}}) < model.predict({"g": {"int4-g128": 1.0}}) < 1.0


def _int8():  # type: ignore[no-untyped-def]
    from tests.search.planted import INT8

    return INT8


def test_after_a_look_that_failed_by_little_the_next_point_is_only_a_little_safer() -> None:
    bench = PlantedBench(GOOD, margins=(Margin("accuracy", 0.02),))
    (near,) = bench.tuning(searcher(bench).menus[0].base)
    short = replace(near, difference=-0.005, lower=-0.021, verdict=Verdict.INCONCLUSIVE)
    far = replace(near, difference=-0.05, lower=-0.06, verdict=Verdict.INFERIOR)
    assert 0.6 < error_to_pass([short], last=False) < 0.95
    assert error_to_pass([short], last=True) < error_to_pass([short], last=False)
    assert error_to_pass([far], last=False) < 0.3
    share = error_to_pass([short], last=False)
    assert 0.005 * share + 0.016 * share**0.5 == pytest.approx(0.9 * 0.02)


def test_onnxruntime_has_products_of_8_bits_for_decoders() -> None:
    target = Target("onnxruntime-cpu", "onnxruntime", "cpu", "x86_64", "linux", "1")
    (menu,) = menus(target, ("float32",), "latency", decoder=True)
    assert list(menu.formats) == ["int4-g128", "int4-g32", "int8-weights", "int8-dynamic", "int8-g128"]
    assert [format_of(way) for ways in menu.formats.values() for way in ways[:1]] == list(menu.formats)


def test_openvino_has_products_of_8_bits_for_decoders_wherever_it_rounds_activations() -> None:
    target = Target("openvino-cpu", "openvino", "cpu", "x86_64", "linux", "1")
    found = menus(target, ("bfloat16", "float32"), "latency", decoder=True)
    assert len(found) == 6
    for menu in found:
        group = menu.base.compute["dynamic_group"]
        ways = menu.formats.get("int8-dynamic", ())
        assert [way.compute["dynamic_group"] for way in ways] == ([group] if group else [])
        assert all(format_of(way) == "int8-dynamic" for way in ways)


def test_onnxruntime_may_leave_activations_unscaled_where_rescaling_costs_time() -> None:
    target = Target("onnxruntime-cpu", "onnxruntime", "cpu", "x86_64", "linux", "1")
    scaled_too, unscaled = menus(target, ["float32"], "latency", decoder=False)
    assert {way.method for way in scaled_too.formats["int8"]} == {"smoothquant", "rtn"}
    assert {way.method for way in unscaled.formats["int8"]} == {"rtn"}
    assert scaled_too.base == unscaled.base
