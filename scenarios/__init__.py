"""Built-in scenarios, one TOML file a data set; installed as `fedbench.scenarios`."""

if __name__ != "fedbench.scenarios":
    raise ImportError("this folder is installed as 'fedbench.scenarios'; import it under that name")
