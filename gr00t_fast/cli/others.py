"""Flags of other programs that people type here, and what is in their place."""

# Whose, and what is in their place here -> names; one that ends in a dot stands for what begins with it.
_IN_PLACE_OF_OTHERS = {
    "NVIDIA's": {
        "The policy server's address is --server=tcp://HOST:PORT of gr00t-fast run.": "policy_host policy_port host port client",
        "This program is the server: leave the flag out.": "server",
        "HTTP is spoken by gr00t-fast serve --http.": "http_server",
        "Use --engine=tensorrt.": "use_tensorrt",
        "Use --engine_path=DIR.": "trt_engine_path",
        "That is chosen when the engine is made: gr00t-fast export tensorrt --precision.": "vit_dtype llm_dtype dit_dtype",
        "Nothing like it is needed here: leave the flag out.": "use_policy",
        "The length of a run is given in seconds: --timeout=SECONDS.": "actions_to_execute",
        'A camera is given as --robot.cameras="{front: {type: opencv, index_or_path: 0}}".': "cam_idx",
        "Use --video=FILE.mp4.": "record_imgs",
        "Use --display: rerun's viewer shows the cameras.": "show_images",
        "gr00t-fast eval has --dataset=DIR and --episodes=0,3 (or all), compares whole episodes and all joints, and draws no plot. "
        "Steps of the network are --denoising_steps=N.": "dataset_path trajs traj_ids steps plot save_plot_path modality_keys",
        "Observations are taken in both forms, nested and flat: leave the flag out.": "use_sim_policy_wrapper",
    },
    "lerobot's": {
        "Nothing like it is needed here: leave the flag out.": "play_sounds",
        "The servos have the gains that lerobot gives them by default: 16, 0 and 32.": "robot.position_p_coefficient robot.position_i_coefficient "
        "robot.position_d_coefficient",
        "There is no human takeover here, and episodes need no strategy. For takeover install plugins/lerobot_policy_gr00t_fast, and use "
        "lerobot-rollout --policy.type=gr00t_fast.": "strategy.",
        "There is no upload here. Use --record=DIR, then `hf upload user/name DIR --repo-type=dataset`.": "dataset.push_to_hub",
        "The length of a run is given in seconds: --timeout=SECONDS.": "duration dataset.episode_time_s",
        "Use --model_path=DIR: the checkpoint says which network it is.": "policy.path policy.pretrained_path policy.type",
        "Use --action_horizon=N.": "policy.n_action_steps actions_per_chunk",
        "Settings of the network are flags of their own, such as --device and --denoising_steps.": "policy.",
        'Use --lang_instruction="...".': "dataset.single_task task",
        "Use --episodes=N.": "dataset.num_episodes",
        "Use --reset_time_s=SECONDS.": "dataset.reset_time_s",
        "Use --fps=N; without it the arm runs at the rate of the checkpoint's training data.": "dataset.fps",
        'Use --camera_map="{mine: checkpoint\'s}".': "dataset.rename_map rename_map",
        "gr00t-fast run records with --record=user/name (or --record=DIR), and gr00t-fast replay plays --dataset=user/name.": "dataset.",
        "Use --display, or --display=HOST:PORT.": "display_data display_ip display_port",
        "Use --record_append=true, beside --record.": "resume",
        "Use --controller=threaded with --smoothing=prefix.": "aggregate_fn_name inference.",
        "There is no teleoperation here: use lerobot-teleoperate or lerobot-record.": "teleop.",
    },
}
FLAGS_OF_OTHERS = {
    name: (owner, remedy) for owner, remedies in _IN_PLACE_OF_OTHERS.items() for remedy, names in remedies.items() for name in names.split()
}
