def Net():
    return {"a": 1}
