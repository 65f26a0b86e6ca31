"""OpenVINO: the same ONNX file, unfused, which it compiles itself."""

import engine
import engine_onnxruntime


def encode(case):
    import openvino

    if case["kind"] != "f32":
        return None
    core = openvino.Core()
    model = core.read_model(engine_onnxruntime.exported(case))
    if "tokens" in case:
        model.reshape({name: [case["batch"], case["tokens"]] for name in ("ids", "mask")})
    n = engine.threads()
    options = {"INFERENCE_NUM_THREADS": n, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", options)

    def states(ids, mask):
        return compiled({"ids": ids, "mask": mask})[0]

    size = case["batch"] if "tokens" in case else 32
    how = f"f32, {n} threads"
    return engine.named(engine.encode_run(case, states, size), f"{how}, batches of {size}")
