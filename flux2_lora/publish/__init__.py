"""From a run or a LoRA file to what is handed on: proved files, a run card that the run can be made again from, a page
for the hub.
"""
