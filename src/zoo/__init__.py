"""The models of the example pipeline: plain `torch.nn.Module`s that know nothing of Triton or of tritonbuild.

They are written from the papers that each module names. Their weights are random, drawn from the `seed` that
pipeline.yaml declares (default 0), and scaled so that every output depends visibly on every input: a model
whose random weights had washed its input out would pass any comparison.
"""
