"""torch.compile(backend="slim"), lowered eagerly but for one test, which takes Inductor."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import KINDS, RECIPES, Chain, Mlp, answer, ids, normal, tiny_llama
from torch import Tensor, nn

import slimfx
import slimfx.backend
import slimfx.stored_weights
from slimfx import SlimError
from slimfx.backend import slim
from slimfx.errors import CalibrationError, PlanError, RecipeError

BATCHES = [normal(1, 20, 16), normal(2, 20, 16)]


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No compiled code from another test, and graphs run as they are instead of in Inductor."""
    torch._dynamo.reset()
    slimfx.backend._SOLVED.clear()
    monkeypatch.setattr(slimfx.backend, "_lower", lambda gm, example_inputs: gm.forward)
    yield
    torch._dynamo.reset()


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the layers that were solved, in order."""
    names: list[str] = []
    module = sys.modules["slimfx.compress"]
    real = module.solve  # type: ignore[attr-defined]

    def solve(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(module, "solve", solve)
    return names


def compiled(model: Any, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    """A model under the backend."""
    return torch.compile(
        model, backend=slim, options={"recipe": "slim", **options}, dynamic=dynamic
    )


def reference(model: nn.Module, recipe: str, *inputs: Tensor, batches: Any = BATCHES) -> nn.Module:
    """What the compiled model stands for: export, compress, run eagerly."""
    shapes = tuple(dict.fromkeys(range(each.dim() - 1), torch.export.Dim.AUTO) for each in inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    return slimfx.compress(program, RECIPES.get(recipe, recipe), batches).module()


class Blocks(nn.Module):
    """Two residual blocks with a buffer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp16() for _ in range(2)])
        self.register_buffer("factor", torch.linspace(1, 2, 16))
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * self.factor
        return self.out(x)


class Mlp16(Mlp):
    """An MLP that ends as wide as it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(32, 16)


class Broken(nn.Module):
    """Two linears with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x.relu())


class Difference(nn.Module):
    """Two arguments that the graph reads in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(y.relu()) - x[:, :8]


@pytest.mark.parametrize("recipe", [*RECIPES, "joint", "smoothquant"])
def test_it_answers_as_the_compressed_program_does(recipe: str) -> None:
    model = Blocks().eval()
    chosen = RECIPES.get(recipe, recipe)
    fast = compiled(model, dynamic=True, recipe=chosen, calibration=BATCHES)
    slow = reference(model, recipe, normal(3, 5, 16))
    for rows in (5, 7):
        x = normal(rows, rows, 16)
        torch.testing.assert_close(fast(x), slow(x), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(fast(x), model(x), atol=1e-3)


def test_llama_answers_as_its_compressed_program_does(solved: list[str]) -> None:
    model = tiny_llama(hidden_size=64).eval()
    model.config.use_cache = False
    batches = [{"input_ids": ids(1, 4, 24)}, {"input_ids": ids(2, 4, 24)}]
    small = slimfx.compress(slimfx.capture(model), "slim", batches)
    names = [name.removeprefix("model.") for name in solved]
    solved.clear()
    fast = compiled(model, dynamic=True, calibration=batches)
    for rows, length in ((3, 10), (2, 12)):
        tokens = ids(3, rows, length)
        want = small.module()(input_ids=tokens)
        got = answer(fast, {"input_ids": tokens})
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert solved == names


def test_inductor_lowers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = Mlp().eval()
    fast = compiled(model, dynamic=True, calibration=BATCHES)
    slow = reference(model, "slim", normal(3, 5, 16))
    lowered = compiled(slow, dynamic=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        for rows in (5, 7):
            x = normal(rows, rows, 16)
            torch.testing.assert_close(fast(x), slow(x), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(lowered(x), slow(x), atol=1e-4, rtol=1e-4)
    compiled_by_us = torch._dynamo.utils.counters["inductor"]["cpp_templated_kernel_counter"]
    assert compiled_by_us >= 4  # two linears each


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_another_batch_size_does_not_solve_again(solved: list[str], dynamic: bool | None) -> None:
    model = Blocks().eval()
    fast = compiled(model, dynamic, calibration=[normal(1, 20, 16)])
    fast(normal(3, 20, 16))
    first, again = list(solved), fast(normal(4, 20, 16))
    assert first == [f"layers.{i}.{name}" for i in (0, 1) for name in ("first", "second")] + ["out"]
    for rows in (3, 5, 1):
        x = normal(4, 20, 16)[:rows]
        torch.testing.assert_close(fast(x), again[:rows], atol=1e-5, rtol=1e-5)
    assert solved == first


def test_a_second_compilation_with_the_same_calibration_does_not_solve_again(
    solved: list[str],
) -> None:
    model = Mlp().eval()
    first = compiled(model, calibration=BATCHES)(BATCHES[0])
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model, calibration=BATCHES)(BATCHES[0]), first)
    assert len(solved) == 2
    torch._dynamo.reset()
    compiled(model, calibration=list(BATCHES))(BATCHES[0])
    torch._dynamo.reset()
    compiled(model, calibration=BATCHES, recipe="wanda")(BATCHES[0])
    assert len(solved) == 6


def test_without_calibration_it_takes_its_first_calls(solved: list[str]) -> None:
    model = Mlp().eval()
    fast = compiled(model, calibration_calls=2)
    for batch in BATCHES:
        torch.testing.assert_close(fast(batch), model(batch))
        assert solved == []
    slow = reference(model, "slim", normal(3, 5, 16))
    solved.clear()
    x = normal(3, 20, 16)
    torch.testing.assert_close(fast(x), slow(x), atol=1e-4, rtol=1e-4)
    assert solved == ["first", "second"]


def test_calls_are_remembered_as_they_were(solved: list[str]) -> None:
    model = Mlp().eval()
    fast = compiled(model, calibration_calls=1)
    x = BATCHES[0].clone()
    fast(x)
    x.zero_()
    slow = reference(model, "slim", normal(3, 5, 16), batches=BATCHES[:1])
    torch.testing.assert_close(fast(BATCHES[1]), slow(BATCHES[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"y": y, "x": x},
    ],
    ids=["tuple", "list", "mapping"],
)
def test_batches_are_in_the_order_of_the_model(form: Callable[..., Any]) -> None:
    model = Difference().eval()
    batches = [form(normal(1, 20, 16), normal(2, 20, 16) * torch.arange(16))]
    fast = compiled(model, dynamic=True, calibration=batches)
    x, y = normal(3, 5, 16), normal(4, 5, 16)
    slow = reference(model, "slim", x, y, batches=batches)
    torch.testing.assert_close(fast(x, y), slow(x, y), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["in place", "data", "other"])
def test_a_changed_weight_is_an_error(change: str) -> None:
    model = Mlp().eval()
    fast = compiled(model, calibration=BATCHES)
    fast(BATCHES[0])
    _change(model, change)
    with pytest.raises(SlimError, match=r"second\.weight: changed since .*reset\(\)"):
        fast(BATCHES[0])
    with pytest.raises(SlimError, match=r"second\.weight: changed"):
        fast(BATCHES[0])


@pytest.mark.parametrize("change", ["in place", "data", "other"])
def test_a_changed_weight_is_compressed_again_on_request(change: str) -> None:
    model = Mlp().eval()
    fast = compiled(model, calibration=BATCHES, on_change="recompress")
    x = BATCHES[0]
    before = fast(x)
    _change(model, change)
    slow = reference(model, "slim", normal(3, 5, 16))
    torch.testing.assert_close(fast(x), slow(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fast(x), before)


def test_recompression_takes_calls_again_where_there_is_no_calibration(solved: list[str]) -> None:
    model = Mlp().eval()
    fast = compiled(model, calibration_calls=1, on_change="recompress")
    fast(BATCHES[0])
    fast(BATCHES[0])
    assert len(solved) == 2
    _change(model, "in place")
    torch.testing.assert_close(fast(BATCHES[1]), model(BATCHES[1]))
    fast(BATCHES[1])
    assert len(solved) == 4


def _change(model: nn.Module, how: str) -> None:
    layer: Any = model.second
    with torch.no_grad():
        if how == "in place":
            layer.weight.mul_(2)
        elif how == "data":
            layer.weight.data = layer.weight.data * 2
        else:
            layer.weight = nn.Parameter(layer.weight * 2)


def test_float_weights_are_not_kept_alive() -> None:
    model = Mlp().eval()
    fast = compiled(model, calibration=BATCHES)
    fast(BATCHES[0])
    given_up = [weakref.ref(model.first.weight), weakref.ref(model.second.weight)]
    model.first.weight = model.second.weight = nn.Parameter(torch.zeros(1))
    gc.collect()
    assert [ref() for ref in given_up] == [None, None]
    assert len(slimfx.backend._SOLVED) <= 2


def test_a_compressed_program_is_only_lowered(solved: list[str]) -> None:
    slow = reference(Blocks().eval(), "slim", normal(3, 5, 16))
    solved.clear()
    fast = compiled(slow)
    for rows in (5, 7):
        x = normal(rows, rows, 16)
        torch.testing.assert_close(fast(x), slow(x), atol=1e-5, rtol=1e-5)
    assert solved == []


def test_a_loaded_program_is_only_lowered(solved: list[str], tmp_path: Path) -> None:
    program = slimfx.capture(Mlp().eval(), (normal(3, 5, 16),))
    slimfx.save(slimfx.compress(program, "slim", BATCHES), tmp_path / "m.pt2")
    solved.clear()
    slow = slimfx.load(tmp_path / "m.pt2").module()
    x = normal(3, 5, 16)
    torch.testing.assert_close(compiled(slow)(x), slow(x), atol=1e-5, rtol=1e-5)
    assert solved == []


def test_a_compressed_program_is_laid_out_once_for_all_its_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = reference(Blocks().eval(), "slim", normal(3, 5, 16))
    made: list[int] = []
    real = slimfx.stored_weights.lay_out

    def lay_out(matrices: Any) -> Any:
        made.append(len(matrices))
        return real(matrices)

    monkeypatch.setattr(slimfx.stored_weights, "lay_out", lay_out)
    fast = compiled(slow, dynamic=False)
    first = fast(normal(1, 5, 16))
    count = len(made)
    assert count > 0
    for rows in (6, 7):
        fast(normal(rows, rows, 16))
    torch._dynamo.reset()
    assert torch.equal(compiled(slow)(normal(1, 5, 16)), first)
    assert len(made) == count


@pytest.mark.parametrize("change", ["written to", "replaced"])
def test_a_stored_weight_that_changes_is_an_error(change: str) -> None:
    slow = reference(Blocks().eval(), "slim", normal(3, 5, 16))
    fast = compiled(slow)
    x = normal(1, 5, 16)
    before = fast(x)
    name, tensor = next((n, t) for n, t in slow.named_buffers() if n.endswith("values"))
    if change == "written to":
        tensor.copy_(tensor.flip(0))
    else:
        owner, _, last = name.rpartition(".")
        setattr(slow.get_submodule(owner), last, tensor.flip(0))
    with pytest.raises(SlimError, match="a stored weight has changed"):
        fast(x)
    torch._dynamo.reset()
    after = compiled(slow)(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, slow(x), atol=1e-5, rtol=1e-5)


def test_each_graph_of_a_broken_model_is_compressed_by_its_own_calls(solved: list[str]) -> None:
    model = Broken().eval()
    fast = compiled(model, calibration_calls=1)
    torch.testing.assert_close(fast(BATCHES[0]), model(BATCHES[0]))
    assert not torch.allclose(fast(BATCHES[0]), model(BATCHES[0]), atol=1e-3)
    assert solved == ["first", "second"]


def test_calibration_of_a_broken_model_is_refused_in_its_second_graph() -> None:
    fast = compiled(Broken().eval(), calibration=BATCHES)
    with pytest.raises(CalibrationError, match="leave calibration out"):
        fast(BATCHES[0])


def test_calibration_does_not_reach_a_submodule_that_breaks_away(solved: list[str]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Broken()
            self.out = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(2 * x))

    with pytest.raises(CalibrationError, match="several graphs"):
        compiled(Outer().eval(), calibration=BATCHES)(BATCHES[0])
    assert solved == []


def test_a_changed_buffer_is_read() -> None:
    model = Blocks().eval()
    model.out = nn.Identity()  # type: ignore[assignment]
    fast = compiled(model, calibration=BATCHES)
    before = fast(BATCHES[0])
    model.factor.zero_()
    torch.testing.assert_close(fast(BATCHES[0]), BATCHES[0])
    assert not torch.allclose(before, BATCHES[0])
    model.factor = torch.ones(16)
    with pytest.raises(SlimError, match="factor: changed since"):
        fast(BATCHES[0])


def test_a_graph_that_shares_layers_with_another_solves_the_rest(solved: list[str]) -> None:
    class Branch(Chain):
        def forward(self, x: Tensor, deep: bool = True) -> Tensor:
            x = self.layers[0](x)
            return self.layers[1](x.relu()) if deep else x

    model = Branch(nn.Linear(16, 32), nn.Linear(32, 8)).eval()
    fast = compiled(model, dynamic=True, calibration=BATCHES, recipe="joint")
    x = normal(3, 5, 16)
    fast(x, False)
    assert solved == ["layers.0"]
    got = fast(x)
    assert solved == ["layers.0", "layers.1"]
    torch.testing.assert_close(got, reference(model, "joint", x)(x), atol=1e-4, rtol=1e-4)


def test_it_runs_in_inference_mode() -> None:
    model = Mlp().eval()
    fast = compiled(model, calibration_calls=1)
    with torch.inference_mode():
        fast(BATCHES[0])
        found = fast(BATCHES[0])
    slow = reference(model, "slim", BATCHES[0], batches=BATCHES[:1])
    torch.testing.assert_close(found, slow(BATCHES[0]), atol=1e-4, rtol=1e-4)


def test_a_graph_without_linears_is_only_lowered(solved: list[str]) -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.ReLU()).eval()
    x = normal(3, 5, 16)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert solved == []


def test_a_graph_that_the_recipe_skips_is_only_lowered(solved: list[str]) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(x)

    model = Head().eval()
    fast = compiled(model, calibration=BATCHES)
    torch.testing.assert_close(fast(BATCHES[0]), model(BATCHES[0]))
    assert solved == []


@pytest.mark.parametrize("kind", ["tied", "in out", "encoder layer"])
def test_other_linears_are_compressed_too(kind: str) -> None:
    case = KINDS[kind]()
    model = case.model.eval()
    name, x = next(iter(case.inputs.items()))
    batches = [batch[name] for batch in case.batches]
    fast = compiled(model, dynamic=True, calibration=batches)
    slow = reference(model, "slim", x, batches=batches)
    torch.testing.assert_close(fast(x), slow(x), atol=1e-4, rtol=1e-4)


def test_a_model_of_a_torch_class_is_compressed_under_its_names(solved: list[str]) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    fast = compiled(model, dynamic=True, calibration=BATCHES)
    with pytest.raises(SlimError, match="Sequential is in training mode"):
        fast(BATCHES[0])
    model.eval()
    slow = reference(model, "slim", normal(3, 5, 16))
    solved.clear()
    torch.testing.assert_close(fast(BATCHES[0]), slow(BATCHES[0]), atol=1e-4, rtol=1e-4)
    assert solved == ["0", "2"]


def test_a_changed_number_of_the_model_is_not_served_stale() -> None:
    class Scaled(Mlp):
        factor = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    model = Scaled().eval()
    fast = compiled(model, dynamic=True, calibration=BATCHES)
    before = fast(BATCHES[0])
    model.factor = 1.5
    try:
        torch.testing.assert_close(fast(BATCHES[0]), 3 * before)
    except SlimError as error:
        assert "factor: changed since" in str(error)


def test_a_function_around_a_model_is_compressed(solved: list[str]) -> None:
    model = Mlp().eval()

    def double(x: Tensor) -> Tensor:
        return 2 * model(x)

    x = normal(3, 5, 16)
    slow = reference(model, "slim", x)
    fast = compiled(double, dynamic=True, calibration=BATCHES)
    torch.testing.assert_close(fast(x), 2 * slow(x), atol=1e-4, rtol=1e-4)
    assert len(solved) == 4


def test_a_model_in_training_mode_is_refused_until_it_is_not() -> None:
    model = Mlp()
    fast = compiled(model, calibration=BATCHES)
    with pytest.raises(SlimError, match=r"Mlp is in training mode; call \.eval\(\)"):
        fast(BATCHES[0])
    model.eval()
    assert fast(BATCHES[0]).shape == (20, 8)
    model.train()
    with pytest.raises(SlimError, match="training mode"):
        fast(BATCHES[0])


def test_an_input_that_needs_a_gradient_is_refused() -> None:
    fast = compiled(Mlp().eval(), calibration=BATCHES)
    x = normal(3, 20, 16).requires_grad_()
    with pytest.raises(SlimError, match=r"input x needs a gradient.*x\.detach\(\)"):
        fast(x)
    with torch.no_grad():
        assert fast(x).shape == (20, 8)
    assert not fast(x.detach()).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipee": "slim"}, "no option is called recipee; options: recipe, calibration, "),
        ({"calibration_calls": 0}, "calibration_calls 0 is not a number from 1 up"),
        ({"on_change": "ignore"}, "'ignore' is not one of error, recompress"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimError, match=message):
        compiled(Mlp().eval(), **options)(BATCHES[0])


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(RecipeError, match="no preset has that name"):
        compiled(Mlp().eval(), recipe="slimm")(BATCHES[0])


def test_a_mode_is_refused() -> None:
    fast = torch.compile(Mlp().eval(), backend=slim, mode="max-autotune")
    with pytest.raises(SlimError, match="no mode 'max-autotune'"):
        fast(BATCHES[0])


def test_calibration_of_another_shape_is_refused() -> None:
    fast = compiled(Mlp().eval(), calibration=BATCHES)
    with pytest.raises(CalibrationError, match=r"x of a calibration batch is \[20, 16\].*dynamic"):
        fast(normal(3, 5, 16))


def test_calibration_that_lacks_an_input_is_refused() -> None:
    fast = compiled(Difference().eval(), dynamic=True, calibration=[{"x": BATCHES[0]}])
    with pytest.raises(CalibrationError, match="holds x, the graph also takes y"):
        fast(normal(3, 5, 16), normal(3, 5, 16))


def test_a_layer_that_does_not_fit_the_recipe_is_named() -> None:
    model = Chain(nn.Linear(16, 30), nn.Linear(30, 8)).eval()
    with pytest.raises(PlanError, match=r"layers\.1: in_features 30"):
        compiled(model, calibration=BATCHES)(BATCHES[0])


def test_torch_finds_it_without_an_import(tmp_path: Path) -> None:
    script = (
        "import sys, torch; names = torch._dynamo.list_backends(None); "
        "print('slim' in names, 'slimfx' in sys.modules); "
        "model = torch.nn.Linear(16, 8).eval(); "
        "fast = torch.compile(model, backend='slim', options={'calibration_calls': 1}); "
        "print(torch.equal(fast(torch.ones(2, 16)), model(torch.ones(2, 16))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == ["True", "False", "True"]


def test_eight_bit_inputs_are_an_option() -> None:
    model, x = Mlp().eval(), normal(3, 5, 16)
    exact, near = (
        compiled(model, True, calibration=BATCHES, accuracy=accuracy)
        for accuracy in ("exact", "int8-activations")
    )
    error = (exact(x) - near(x)).norm() / exact(x).norm()
    assert 1e-4 < error < 0.05
    small = reference(model, "slim", x)
    torch.testing.assert_close(compiled(small, True, accuracy="int8-activations")(x), near(x))
    with pytest.raises(SlimError, match="accuracy 'low' is not one of exact, int8-activations"):
        compiled(model, accuracy="low")(x)


@pytest.mark.parametrize("on_the_fly", [True, False])
def test_linears_without_a_kernel_are_warned_of(on_the_fly: bool) -> None:
    model, x = Mlp().eval(), normal(3, 5, 16)
    small = reference(model, "wanda", x)
    if on_the_fly:
        run = compiled(model, True, recipe=RECIPES["wanda"], calibration=BATCHES)
    else:
        run = compiled(small)
    with pytest.warns(UserWarning, match="2 compressed linears have no kernel .* groups of 8"):
        torch.testing.assert_close(run(x), small(x))
