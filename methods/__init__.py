"""Built-in methods, one file each; installed as `fedbench.methods`."""

if __name__ != "fedbench.methods":
    raise ImportError("this folder is installed as 'fedbench.methods'; import it under that name")
