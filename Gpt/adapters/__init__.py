"""Low-rank adapters of frozen language models, as networks that a zoo holds and a generator writes.

Your own tasks need no change of the library. Sort samples, one JSON object a line with "prompt" and "answer", into
prompt sets; put PEFT adapters into one sub-folder for each task; and name both in a task file:

    python -m Gpt.adapters.tools prepare --source arc.jsonl boolq.jsonl --output-dir prompts
    python -m Gpt.adapters.tools analyze --adapters adapters

    # my_tasks.py
    family = AdapterFamily("prompts", unseen_rules=1, unseen_combinations=0, validation=1)
    recipe = AdapterRecipe("smollm2", spec_of("adapters/arc/checkpoint-100"))
    TASK_METADATA = {"mine": adapter_entry(family, recipe) | {"checkpoints": "adapters"}}

Without the key "checkpoints", the library trains the adapters itself.
"""
