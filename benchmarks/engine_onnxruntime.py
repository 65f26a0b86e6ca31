"""onnxruntime: the encoder exported by torch, its layers fused by onnxruntime's own optimiser; int8 by its dynamic quantisation."""

import engine


def exported(case):
    """The ONNX file with ids and mask (B, T) in, states (B, T, C) out."""
    import torch
    from transformers import AutoModel

    path = engine.shared(f"{case['model']}.onnx")
    if not path.exists():
        model = AutoModel.from_pretrained(engine.folder(case), dtype=torch.float32, attn_implementation="eager").eval()

        class States(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, ids, mask):
                return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

        axes = {name: {0: "batch", 1: "time"} for name in ("ids", "mask", "states")}
        ones = torch.ones(2, 16, dtype=torch.long)
        with engine.making(path) as new:
            torch.onnx.export(
                States(), (ones, ones), str(new), input_names=["ids", "mask"], output_names=["states"], dynamic_axes=axes, dynamo=False,
                opset_version=17,
            )  # fmt: skip
    return path


def prepared(case):
    import json

    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    source = exported(case)
    path = engine.shared(f"{case['model']}-{case['kind']}-fused.onnx")
    if not path.exists():
        config = json.loads((engine.folder(case) / "config.json").read_text())
        heads, width = config["num_attention_heads"], config["hidden_size"]
        model = optimizer.optimize_model(str(source), model_type="bert", num_heads=heads, hidden_size=width, opt_level=1)
        with engine.making(path) as new:
            if case["kind"] == "int8":
                float_path = new.with_suffix(".f32")
                model.save_model_to_file(str(float_path))
                # 8-bit by tensor: by channel its products do not fuse with what follows
                quantize_dynamic(str(float_path), str(new), weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": 1})
                float_path.unlink()
            else:
                model.save_model_to_file(str(new))
    return path


def plain_int8(case):
    """The file with dynamically quantised products and no operations of onnxruntime's own: for OpenVINO."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = engine.shared(f"{case['model']}-int8-plain.onnx")
    if not path.exists():
        with engine.making(path) as new:
            quantize_dynamic(str(exported(case)), str(new), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    return path


def encode(case):
    if case["kind"] not in ("f32", "int8"):
        return None
    size, found = case["batch"] if "tokens" in case else 32, []
    for workers, count in engine.setups():
        run = engine.encode_run(case, [session(case, count) for _ in range(workers)], size)
        found.append(engine.named(run, f"{case['kind']}, {workers} x {count} threads, batches of {size}"))
    return engine.best(found)


def session(case, count):
    """What maps ids and mask to states."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = count
    session = ort.InferenceSession(str(prepared(case)), options, providers=["CPUExecutionProvider"])
    wanted = {i.name: np.int32 if "int32" in i.type else np.int64 for i in session.get_inputs()}

    def states(ids, mask):
        given = {"ids": ids, "mask": mask}
        return session.run(None, {k: given[k].astype(t, copy=False) for k, t in wanted.items()})[0]

    return states
