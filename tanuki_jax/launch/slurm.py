ACTIONS = {"run": "r"}
