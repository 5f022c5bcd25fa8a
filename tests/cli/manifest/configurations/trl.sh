#!/bin/sh
# QLoRA on one machine with two GPUs
accelerate launch --num_processes 2 trl/scripts/sft.py \
    --model_name_or_path acme/chat-0.5b \
    --dataset_name acme/pairs \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --gradient_checkpointing \
    --eos_token '<|im_end|>' \
    --use_peft \
    --load_in_4bit \
    --lora_r 32 \
    --lora_alpha 16 \
    --lora_target_modules q_proj v_proj \
    --optim paged_adamw_8bit \
    --output_dir chat-0.5b-sft
