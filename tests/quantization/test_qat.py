"""prepare_qat: trains exactly the emulation that optimize() then builds; dropout where the model has it; refusals."""

from __future__ import annotations

import copy
import math

import models
import pytest
import torch
from torch import nn

import accelkit
from accelkit import CaptureError, InputError, Int8
from accelkit.quantization import Calibration, QatModel, distillation_loss, prepare_qat
from accelkit.quantization.tape import Tape
from accelkit.quantization.training_graph import rounded

pytestmark = pytest.mark.filterwarnings("ignore:.*slower than the original:accelkit.AccelkitWarning")
F, WIDTH = nn.functional, models.WIDTH


def vit():
    model, batches = models.vit()
    model.layers = model.layers[:1]
    return model, batches


def bert():
    model, batches = models.bert()
    model.layers = model.layers[:1]
    return model, batches


def first(output):
    return output[0] if isinstance(output, tuple) else output


def called(model, batch):
    return first(model(*batch) if isinstance(batch, tuple) else model(batch))


def optimized(model, example, precision="int8", **options):
    return accelkit.optimize(model, example, target="eager", precision=precision, cache=False, **options)


def step(qat: nn.Module, batch, rate: float = 0.05) -> None:
    optimizer = torch.optim.SGD([p for p in qat.parameters() if p.requires_grad], rate)
    called(qat, batch).square().mean().backward()
    optimizer.step()


class Dropped(nn.Module):
    """A BERT's layer with all of its dropout, attention written out by hand or not."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Linear(WIDTH, 3)
        self.drop, self.by_hand = nn.Dropout(0.5), by_hand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], 4, WIDTH // 4)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        if self.by_hand:
            y = self.drop(torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // 4), -1)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        x = self.norm1(x + self.drop(self.out(y.transpose(1, 2).reshape(x.shape))))
        x = self.norm2(x + self.drop(self.down(self.drop(F.gelu(self.up(x))))))
        return self.head(self.drop(x[:, 0]))


# --- exactly the emulation


@pytest.mark.parametrize(("family", "scheme"), [("vit", "ft1"), ("vit", "ft2"), ("vit", "qdq"), ("bert", "ft2")])
def test_what_is_trained_is_what_is_built(family: str, scheme: str) -> None:
    model, batches = vit() if family == "vit" else bert()
    before = copy.deepcopy(model.state_dict())
    qat = prepare_qat(model, batches[0], Int8(scheme), calibration=batches).train()
    assert list(qat.state_dict()) == list(before)
    step(qat, batches[1])
    fast = optimized(qat, batches[0])
    assert torch.equal(called(fast, batches[2]), called(qat.eval(), batches[2]))
    assert not torch.equal(called(qat, batches[2]), called(qat.float_model, batches[2]))
    variant = fast.report().variants[0]
    assert tuple(layer.layer for layer in variant.layers) == qat.quantised
    assert f"int8(scheme='{scheme}')" in str(fast.report()) or scheme == "qdq"
    trained = copy.deepcopy(model)
    trained.load_state_dict(qat.state_dict())
    assert not torch.equal(trained.layers[0].up.weight, model.layers[0].up.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_before_training_it_is_post_training_quantisation() -> None:
    model, batches = vit()
    calibration = Calibration.collect(model, batches)
    qat = prepare_qat(model, batches[0], Int8("ft2"), calibration=calibration).eval()
    plain = optimized(model, batches[0], Int8("ft2"), calibration=calibration)
    assert torch.equal(qat(batches[1]), plain(batches[1]))
    assert ("head", "ft2 leaves what is behind the last residual sum in float32") in qat.left_alone


def test_dynamic_needs_no_calibration() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 8)
    qat = prepare_qat(model, x, Int8("dynamic"))
    step(qat.train(), x)
    assert torch.equal(optimized(qat, x)(2 * x), qat.eval()(2 * x))
    with pytest.raises(InputError, match="calibration is for precisions that need it"):
        prepare_qat(model, x, Int8("dynamic"), calibration=[x])


def test_folded_batch_norms_are_trained_through() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    for _ in range(3):
        model.train()(torch.randn(16, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    qat = prepare_qat(model.eval(), x, calibration=[x]).train()
    before = model[1].weight.clone()
    step(qat, x)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in qat.parameters())
    assert not torch.equal(dict(qat.named_parameters())["1.weight"], before)
    assert torch.equal(optimized(qat, x)(x), qat.eval()(x))


def test_gradients_are_those_of_the_float_model_where_rounding_is_fine() -> None:
    model, batches = vit()
    qat = prepare_qat(model, batches[0], Int8("ft1", "max"), calibration=batches).train()
    qat(batches[0]).square().sum().backward()
    model(batches[0]).square().sum().backward()
    ours = torch.cat([p.grad.reshape(-1) for p in qat.parameters()])
    plain = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert float((ours - plain).norm() / plain.norm()) < 0.15


def test_a_clipped_value_has_no_gradient() -> None:
    x = torch.tensor([-2.0, -0.4, 0.3, 1.27, 1.29], requires_grad=True)
    rounded(x, 0.01, 0, -128, 127, torch.int8).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


# --- training


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("scheme", ["qdq", "ft2"])
def test_dropout_is_where_the_model_has_it(by_hand: bool, scheme: str) -> None:
    torch.manual_seed(0)
    model, x = Dropped(by_hand).eval(), torch.randn(2, 7, WIDTH)
    qat = prepare_qat(model, x, Int8(scheme), calibration=[x])
    assert qat.without_dropout == ()
    dropped = [n for n in qat._made.graph.graph.nodes if n.target is F.dropout]
    assert len(dropped) == 5
    assert sum(n.args[0].target is torch.ops.aten.softmax.int for n in dropped) == 1
    assert torch.equal(qat.eval()(x), qat(x))
    assert not torch.equal(qat.train()(x), qat(x))
    # the mean over many masks is near the result without: the masks are scaled
    mean = torch.stack([F.softmax(qat(x), -1) for _ in range(60)]).mean(0)
    assert (mean - F.softmax(qat.eval()(x), -1)).abs().max() < 0.3


def test_randomness_that_is_no_dropout_is_told() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.second(x + torch.randn_like(x) if self.training else x)

    x = torch.randn(4, 8)
    with pytest.warns(accelkit.AccelkitWarning, match="runs without: randn_like.*: random, and no dropout"):
        qat = prepare_qat(Noisy().eval(), x, calibration=[x])
    assert len(qat.without_dropout) == 1


def test_dropout_beside_the_value_itself_is_told() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.first(x))
            return self.second(self.drop(y)) + y

    x = torch.randn(4, 8)
    with pytest.warns(accelkit.AccelkitWarning, match="its input is also read as it is"):
        qat = prepare_qat(Both().eval(), x, calibration=[x]).train()
    assert torch.equal(qat(x), qat(x))


def test_dropout_in_a_wrong_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.quantization import dropouts

    right = dropouts._found

    def wrong(graph, wanted, inputs):
        found = right(graph, wanted, inputs)
        return dict(zip(found, reversed(found.values()), strict=True))

    monkeypatch.setattr(dropouts, "_found", wrong)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5)
    ).eval()
    x = torch.randn(4, 8)
    with pytest.warns(accelkit.AccelkitWarning, match="is not where the model has it"):
        qat = prepare_qat(model, x, calibration=[x]).train()
    assert len(qat.without_dropout) == 2
    assert torch.equal(qat(x), qat(x))


def test_ranges_observed_in_the_first_steps() -> None:
    model, batches = vit()
    qat = prepare_qat(model, batches[0], Int8("ft2"), observe=2).train()
    assert qat.quantised == ()
    with pytest.raises(InputError, match="has not seen enough batches"):
        optimized(qat, batches[0])
    assert torch.equal(qat(batches[0]), model(batches[0]))
    qat.eval()(batches[1])
    assert qat.quantised == ()
    qat.train()(batches[1])
    assert len(qat.quantised) == 5
    assert qat.calibration.batches == 2
    assert torch.equal(optimized(qat, batches[0])(batches[2]), qat.eval()(batches[2]))


def test_training_brings_the_error_down_and_a_copy_is_a_checkpoint() -> None:
    model, batches = vit()
    calibration = Calibration.collect(model, batches)
    keep = {"precision": Int8("ft2", keep="layers.0.up"), "calibration": calibration}
    qat = prepare_qat(model, batches[0], **keep).train()
    x = torch.cat(batches)
    # far from what the model gives, so that there is something to learn
    teacher = [4 * F.one_hot(torch.arange(2), 5).float() for _ in batches]
    optimizer = torch.optim.AdamW(qat.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        losses.append(sum(distillation_loss(qat(b), t) for b, t in zip(batches, teacher, strict=True)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    again = prepare_qat(model, batches[0], **keep)
    again.load_state_dict(qat.state_dict())
    assert torch.equal(again.eval()(x[:2]), qat.eval()(x[:2]))
    twin = copy.deepcopy(qat)
    step(twin.train(), batches[0])
    assert torch.equal(again(x[:2]), qat.eval()(x[:2]))
    assert not torch.equal(twin.eval()(x[:2]), qat(x[:2]))


def test_sizes_that_vary() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(4, 8)
    shapes = {"input": {0: accelkit.Dim("batch", max=8)}}
    qat = prepare_qat(model, x, calibration=[x], dynamic_shapes=shapes).train()
    step(qat, torch.randn(5, 8))
    fast = optimized(qat, x, dynamic_shapes=shapes)
    assert torch.equal(fast(x[:3]), qat.eval()(x[:3]))
    with pytest.raises(InputError, match=r"dynamic_shapes=.*drop_last"):
        qat(torch.randn(9, 8))


def test_attributes_output_types_and_frozen_weights() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.config = nn.Linear(8, 8), {"width": 8}

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
            return {"logits": self.linear(x) * scale}

    model = Labelled().train()
    model.linear.bias.requires_grad_(False)
    x = torch.randn(4, 8)
    qat = prepare_qat(model, {"x": x, "scale": 2.0}, calibration=[{"x": x, "scale": 2.0}])
    assert qat.config == {"width": 8}
    assert qat.training
    qat(x, scale=2.0)["logits"].sum().backward()
    assert dict(qat.named_parameters())["linear.bias"].grad is None
    assert [name for name, _ in qat.named_modules()] == ["", "linear"]
    with pytest.raises(AttributeError, match="nothing"):
        qat.nothing  # noqa: B018
    assert isinstance(qat, QatModel)


# --- refused


def test_what_cannot_be_trained() -> None:
    model, batches = vit()
    with pytest.raises(InputError, match="prepare_qat trains for int8, not bf16"):
        prepare_qat(model, batches[0], "bf16")
    with pytest.raises(InputError, match="SmoothQuant changes weights"):
        prepare_qat(model, batches[0], Int8(smooth=0.5), calibration=batches)
    with pytest.raises(InputError, match="observe=0"):
        prepare_qat(model, batches[0], observe=0)
    other, _ = vit()
    torch.nn.init.normal_(other.layers[0].up.weight)
    with pytest.raises(InputError, match="the calibration is of another model"):
        prepare_qat(model, batches[0], calibration=Calibration.collect(other, batches))
    with pytest.raises(InputError, match=r"quantises nothing of Tanh: it has no layers that a scheme knows"):
        prepare_qat(nn.Tanh(), batches[0], Int8("dynamic"))
    qat = prepare_qat(model, batches[0], Int8("ft1"), calibration=batches)
    with pytest.raises(InputError, match="prepared already"):
        prepare_qat(qat, batches[0])
    with pytest.raises(InputError, match=r"trained for int8\(scheme='ft1'\), not int8\(scheme='ft2'\)"):
        optimized(qat, batches[0], Int8("ft2"))
    with pytest.raises(InputError, match="calibration is not needed"):
        optimized(qat, batches[0], calibration=batches)
    assert torch.equal(optimized(qat, batches[0], "fp32")(batches[0]), qat.float_model.eval()(batches[0]))


def test_a_model_that_writes_to_its_buffers() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.linear(x)

    with pytest.raises(CaptureError, match="writes to its buffers"):
        prepare_qat(Counts().eval(), torch.randn(2, 8), Int8("dynamic"))


# --- parts


def test_the_tape_replays_with_gradients() -> None:
    a, b, other = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 3)), torch.randn(6, 3)
    with Tape({"a": a, "b": b}) as tape, torch.no_grad():
        both = torch.cat([a.detach(), b])
        wanted = (both * 2 + other).t().contiguous()
        part = a[1:].as_strided((1, 2), (3, 1))
        written = both.clone()
        written.mul_(3)
        other.add(1)
    assert len(tape.steps) < 12
    numbers = [tape.number_of(t) for t in (wanted, part, written)]
    assert tape.number_of(other) is None
    values = {0: a, 1: b}
    tape.replay(numbers, values)
    for number, recorded in zip(numbers, (wanted, part, written), strict=True):
        assert torch.equal(values[number], recorded)
    (values[numbers[0]].sum() + values[numbers[1]].sum()).backward()
    assert a.grad.tolist() == [[2, 2, 2], [3, 3, 2]]


def test_distillation_loss() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    p, q = (F.softmax(t.double() / 3, -1) for t in (teacher, student))
    by_hand = 9 * (p * (p / q).log()).sum(-1).mean()
    loss = distillation_loss(student, teacher)
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    targets = torch.tensor([0, 1, 2, 3, -100])
    both = distillation_loss(student, teacher, targets, soft=0.25)
    wanted = 0.25 * loss + 0.75 * F.cross_entropy(student, targets)
    assert float(both.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    both.backward()
    assert teacher.grad is None
    for bad in ({"temperature": 0.0}, {"soft": 2.0}, {"targets": torch.zeros(4, dtype=torch.long)}):
        with pytest.raises(InputError):
            distillation_loss(student, teacher, **bad)
    with pytest.raises(InputError, match="of one shape"):
        distillation_loss(student, teacher[:2])
