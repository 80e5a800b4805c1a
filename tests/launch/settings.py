"""Settings that the scripts of Cloud TPUs need."""

SETTINGS = {
    "TPU_NAME": "tanuki",
    "ZONE": "us-east5-a",
    "TPU_TYPE": "v5p-256",
    "CONFIG": "configs/tanuki_8b.py:/mnt/my data",
    "WORKDIR": "/mnt/run",
}
