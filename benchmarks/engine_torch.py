"""torch in eager mode, on the modules of transformers with its scaled_dot_product_attention."""

import engine


def encode(case, compiled=False):
    import torch
    from transformers import AutoModel

    if case["kind"] != "f32":
        return None
    model = AutoModel.from_pretrained(engine.folder(case), dtype=torch.float32, attn_implementation="sdpa").eval()
    if compiled:
        model = torch.compile(model, dynamic="tokens" not in case)

    def states(ids, mask):
        mask = None if mask.all() else torch.from_numpy(mask)
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids), attention_mask=mask).last_hidden_state.numpy()

    how = f"f32, {engine.threads()} threads"
    size = case["batch"] if "tokens" in case else 32
    return engine.named(engine.encode_run(case, states, size), f"{how}, batches of {size}")
