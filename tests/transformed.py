"""Loads an exported folder with transformers, in a separate process: its modules are cached under HF_HOME."""

import sys
import warnings

warnings.simplefilter("ignore")


def main(folder, saved_again):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = torch.load(f"{folder}/../inputs.pt", weights_only=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = torch.ones_like(ids)
    end, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    with torch.no_grad():
        outputs = {
            "logits": model(ids).logits,
            "masked": model(input_ids=ids, attention_mask=mask).logits,
            "loss": model(ids, labels=ids).loss,
            "generated": model.generate(ids, attention_mask=whole, max_new_tokens=6, do_sample=False),
            "beams": model.generate(ids, attention_mask=whole, max_new_tokens=4, num_beams=3, do_sample=False),
        }
    model.generation_config.eos_token_id = end
    model.save_pretrained(saved_again)
    again = AutoModelForCausalLM.from_pretrained(saved_again, trust_remote_code=True, dtype=torch.bfloat16)
    with torch.no_grad():
        outputs["again"] = again(ids).logits
        outputs["rounded"] = again.float()(ids).logits  # of the weights as they were rounded
    fresh = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    outputs |= {
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "vocabulary": model.config.vocab_size,
        "parameters": model.num_parameters(),
        "fresh": fresh.state_dict()["model.blocks.0.feed_forward.first.weight"],
    }
    writer = pipeline("text-generation", model=folder, trust_remote_code=True)
    prompts = ["ab", "abcdefg", "a"]
    written = writer(prompts, batch_size=3, max_new_tokens=4, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rows = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    alone = [model.generate(**row, max_new_tokens=4, do_sample=False)[0] for row in rows]
    outputs["written"] = [each[0]["generated_text"] for each in written]
    outputs["alone"] = [tokenizer.decode(each, skip_special_tokens=True) for each in alone]
    torch.save(outputs, f"{folder}/../outputs.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
