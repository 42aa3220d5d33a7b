"""The machine that the code runs on: its processes, devices, disk and installed packages. Imports nothing of ours."""
