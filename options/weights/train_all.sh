#!/usr/bin/env bash
# Train the shipped networks but x3, stage after stage; the same command goes on where the last one stopped. Usage:
#     options/weights/train_all.sh MINUTES [OPTIONS OF mlrn train]
# After MINUTES it ends by itself with the code 75: not finished. Run it in the folder that holds options/, the data
# that the files name and RLFN's checkpoints as rlfn_x2.pth, rlfn_x4.pth and rlfn_ntire_x4.pth.
set -euo pipefail
end=$((SECONDS + 60 * ${1:?how many MINUTES to train at most}))
shift
for stage in x4_blocks x4_chain x2_blocks x2_chain NTIRE_x4_blocks NTIRE_x4_chain; do
    [ -e "experiments/MLRN_$stage/models/net_g_latest.pth" ] && continue  # what BasicSR writes at the end
    echo "== $stage"
    left=$(((end - SECONDS + 59) / 60))
    ((left > 0)) || exit 75
    mlrn train -opt "options/weights/train_MLRN_$stage.yml" --auto_resume --time_limit "$left" "$@"
done
