RECORD = "sweep.json"
