"""Low-rank adapters of frozen language models, as networks that a zoo holds and a generator writes.

Your own tasks need no change of the library. Sort samples, one JSON object a line with "prompt" and perhaps "answer",
into prompt sets; put PEFT adapters into one sub-folder for each task; and name both in a task file:

    python -m Gpt.adapters.tools prepare --source arc.jsonl boolq.jsonl --output-dir prompts
    python -m Gpt.adapters.tools analyze --adapters adapters

    # my_tasks.py
    from Gpt.adapters.family import AdapterFamily
    from Gpt.adapters.peft_io import spec_of
    from Gpt.catalogue.adapters import adapter_entry
    from Gpt.recipes import AdapterRecipe

    family = AdapterFamily("prompts", unseen_rules=1, unseen_combinations=0, validation=1)
    recipe = AdapterRecipe("smollm2", spec_of("adapters/arc/checkpoint-100"))
    TASK_METADATA = {"mine": adapter_entry(family, recipe) | {"checkpoints": "adapters"}}

and train a generator, here on CUDA or a CPU alike:

    python main.py --config-name lora_query task=mine task_modules=[my_tasks.py] run.name=mine \\
        generator.translated=false generator.loss.sft=0 generator.loss.mse=1 generator.loss.regression_until=1

Where samples have answers, adapters are tested by them, the loss may go through the language model (leave the three
settings of the loss out), and without the key "checkpoints" the library trains the adapters itself. Where no sample has
one, the folder of adapters is all there is to learn from: what is written is judged by its distance to the task's own
adapter, and the language model's weights are never read, only its configuration (DoRA reads them once, for its
magnitudes).
"""
