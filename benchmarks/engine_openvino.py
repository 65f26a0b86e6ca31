"""OpenVINO: the same ONNX file, unfused, which it compiles itself; int8 with onnxruntime's dynamically quantised products."""

import engine
import engine_onnxruntime


def encode(case):
    if case["kind"] not in ("f32", "int8"):
        return None
    size, found = case["batch"] if "tokens" in case else 32, []
    for workers, count in engine.setups():
        run = engine.encode_run(case, requests(case, workers, count), size)
        found.append(engine.named(run, f"{case['kind']}, {workers} x {count} threads, batches of {size}"))
    return engine.best(found)


def requests(case, workers, count):
    """For each stream what maps ids and mask to states."""
    import openvino

    core = openvino.Core()
    exact = case["kind"] == "f32"
    model = core.read_model(engine_onnxruntime.exported(case) if exact else engine_onnxruntime.plain_int8(case))
    if "tokens" in case:
        model.reshape({name: [-(-case["batch"] // workers), case["tokens"]] for name in ("ids", "mask")})
    options = {"INFERENCE_NUM_THREADS": workers * count, "NUM_STREAMS": workers, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", options)

    def states(request):
        return lambda ids, mask: request.infer({"ids": ids, "mask": mask})[0]

    return [states(compiled.create_infer_request()) for _ in range(workers)]
