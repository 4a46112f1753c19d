"""Models prepared for inference, compared with the unprepared ones."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

from conftest import tiny_config
from generating import CPU, generated, sampling, tiny_model
from gptlab.model.generation import inference
from gptlab.model.generation.generate import plain_decoder
from gptlab.model.generation.inference import (
    BUCKET,
    Int8Linear,
    PackedLinear,
    SplitInt8Linear,
    build_decoder,
    bytes_per_token,
    cuda_seconds,
    prepare_for_inference,
    static_decoder,
    supports_packing,
    supports_split_int8,
)
from gptlab.model.gpt import GPT

PACKS = pytest.mark.skipif(not supports_packing(torch.bfloat16, CPU), reason="needs a CPU with bfloat16 instructions")


def prepared(model: GPT, precision: str, **options) -> GPT:
    return prepare_for_inference(copy.deepcopy(model), precision, CPU, **{"int8": False, "packed": True} | options)


ARGUMENTS = {
    "mkldnn::_reorder_linear_weight": "self batch_size",
    "mkldnn::_linear_pointwise": "X W B attr scalars algorithm",
    "mkldnn::_is_mkldnn_bf16_supported": "",
    "aten::_weight_int8pack_mm": "self mat2 scales",
    "onednn::qlinear_prepack": "weight x_shape",
    "onednn::qlinear_pointwise": "qx x_scale x_zero_point qw w_scale w_zero_point bias output_scale output_zero_point "
    "output_dtype post_op_name post_op_args post_op_algorithm",
}


@pytest.mark.parametrize("operator", ARGUMENTS)
def test_private_operators_of_torch_have_the_expected_arguments(operator):
    """Runs on any CPU; the results are tested below, on CPUs that support the operators."""
    namespace, name = operator.split("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    assert [argument.name for argument in schema.arguments] == ARGUMENTS[operator].split()


def test_torch_reports_vnni():
    assert torch.cpu._is_vnni_supported() == torch.cpu.get_capabilities().get("avx512_vnni", False)


@PACKS
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_matches_the_plain_layer(rows, bias):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):  # bfloat16 has 8 bits
        linear = nn.Linear(97, 61, bias=bias).to(dtype).requires_grad_(False)
        x = torch.randn(rows, 2, 97).to(dtype)
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=tolerance, rtol=tolerance)


@PACKS
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_a_packed_layer_with_fused_gelu_matches_torch(approximate):
    torch.manual_seed(0)
    linear, x = nn.Linear(97, 61).requires_grad_(False), 3 * torch.randn(5, 97)
    layer = PackedLinear(linear)
    layer.fuse_gelu(approximate)
    expected = nn.functional.gelu(x.double() @ linear.weight.double().T + linear.bias, approximate=approximate)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not supports_split_int8(CPU), reason="needs a CPU with 8-bit integer instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_a_split_int8_layer_multiplies_16_bit_inputs_by_the_rounded_weight(rows, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(3072, 64).to(dtype).requires_grad_(False)
    linear.weight[3] = 0  # has no scale
    x = (torch.randn(rows, 2, 3072) * torch.logspace(-6, 3, rows)[:, None, None]).to(dtype)
    x[0, 1] = 0
    found = SplitInt8Linear(linear)(x)
    scale = linear.weight.double().abs().amax(1, keepdim=True) / 127
    rounded = (linear.weight.double() / scale.clamp(min=1e-30)).round() * scale
    expected = x.double() @ rounded.T + linear.bias.double()
    off = x.double().abs().amax(-1, keepdim=True) / 65_024 * rounded.abs().sum(1)  # the sum of all rounding errors
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= off + torch.finfo(dtype).eps * expected.abs() + 1e-7).all()


@pytest.mark.parametrize("rows", [1, 32, 33, 60])  # below and above MAX_INT8_ROWS
def test_an_int8_layer_multiplies_by_the_rounded_weight(rows):
    torch.manual_seed(0)
    linear = nn.Linear(96, 64).requires_grad_(False)
    linear.weight[3] = 0  # has no scale
    layer, x = Int8Linear(linear), torch.randn(rows, 96)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    rounded = (linear.weight / scale.clamp(min=1e-30)).round() * scale
    assert (rounded - linear.weight).abs().max() <= scale.max() / 2 * 1.001
    torch.testing.assert_close(layer(x), x @ rounded.T + linear.bias, atol=1e-5, rtol=1e-5)


@PACKS
@pytest.mark.parametrize("options", [{}, {"bias": False, "tie_weights": False, "positions": "rotary"}])
@torch.no_grad()
def test_a_prepared_model_gives_the_same_logits_within_rounding(options):
    model, idx = tiny_model(**options), torch.randint(61, (3, 16))
    plain = model(idx)
    torch.testing.assert_close(prepared(model, "float32")(idx), plain, atol=1e-5, rtol=1e-5)
    coarse = prepared(model, "bfloat16", packed=False)(idx)
    # the standard deviation of the logits is 3; the rounding errors of all layers together are below this tolerance
    torch.testing.assert_close(prepared(model, "bfloat16")(idx), coarse, atol=0.1, rtol=0)
    torch.testing.assert_close(coarse.float(), plain, atol=0.15, rtol=0)
    torch.testing.assert_close(prepared(model, "float32", int8=True)(idx), plain, atol=0.3, rtol=0)


@pytest.mark.skipif(not supports_split_int8(CPU), reason="needs a CPU with 8-bit integer instructions")
@torch.no_grad()
def test_split_int8_layers_give_the_same_logits_as_int8_layers(monkeypatch):
    model, idx = tiny_model(), torch.randint(61, (3, 16))
    plain = prepared(model, "float32", int8=True)
    monkeypatch.setattr(inference, "SPLIT_MIN_NUMEL", 0)
    split = prepared(model, "float32", int8=True)
    assert isinstance(split.lm_head, SplitInt8Linear)
    torch.testing.assert_close(split(idx), plain(idx), atol=2e-3, rtol=0)  # the standard deviation of the logits is 3


@PACKS
def test_a_packed_model_generates_the_same_tokens():
    model, how = tiny_model(), sampling(top_k=20)
    packed = prepared(model, "float32")
    assert generated(packed, [[1, 2, 3], [4]], how, tokens=40) == generated(model, [[1, 2, 3], [4]], how, tokens=40)


def test_bytes_per_token():
    model = GPT(tiny_config())  # n_embd=32, n_layer=2, vocab_size=61
    matrices = 2 * 12 * 32 * 32 + 61 * 32
    cache = 3 * 10 * 2 * 2 * 32
    assert bytes_per_token(model, 3, 10) == 4 * (matrices + cache)
    half = prepared(model, "bfloat16", packed=False)
    assert bytes_per_token(half, 3, 10) == 2 * matrices + 4 * cache  # the cache is in float32 on a CPU
    assert bytes_per_token(prepared(model, "bfloat16", int8=True), 1, 0) == matrices


@pytest.mark.slow
def test_a_compiled_decoder_generates_the_same_tokens_with_one_graph_per_bucket():
    model = tiny_model(block_size=2 * BUCKET)
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    counter.clear()
    fast = build_decoder(prepared(model, "float32", packed=False), compiled=True)
    found = generated(model, [[1, 2], [3]], sampling(top_k=5), tokens=BUCKET + 20, decoder=fast)
    assert found == generated(model, [[1, 2], [3]], sampling(top_k=5), tokens=BUCKET + 20)
    assert counter["stats"]["unique_graphs"] == 2
    assert plain_decoder(model).bucket == 1


@pytest.mark.slow
def test_a_graph_for_all_slots_writes_only_to_static_inputs():
    """CUDA graphs are skipped if a graph writes to an input that may move."""
    model = prepared(tiny_model(block_size=16), "float32", packed=False)
    written, static = [], []

    def inspect(graph, _):
        metadata = TracingContext.get().fw_metadata
        written.append(set(metadata.mutated_inp_runtime_indices))
        static.append(set(metadata.static_input_indices))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    graph = torch.compile(model.next_logits, dynamic=False, backend=aot_autograd(fw_compiler=inspect))
    decoder = static_decoder(graph, 16)
    for prompt in ([1, 2], [3]):  # with a cache each; more tokens than a block
        found = generated(model, [prompt], sampling(top_k=5), tokens=30, decoder=decoder)
        assert found == generated(model, [prompt], sampling(top_k=5), tokens=30)
    assert [len(inputs) for inputs in written] == [2 * model.config.n_layer]  # one graph: keys and values
    assert written[0] <= static[0]


def test_cuda_seconds_excludes_the_warm_up(monkeypatch):
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            return end.time - self.time

    def kernel():
        clock[0] += 1000 if clock[0] < 3000 else 2  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert cuda_seconds(kernel, 4) == [0.002] * 4
