"""What a run was, and what it took: written down while it trains, shown as a model card, compared with other runs.

    facts     what is said of a run before it starts: settings, model, data, versions, device
    record    the run's report as it grows: memory, loss and speed of each training, also over resumptions
    report    lowmem_report.json: written atomically, read with care; or made from a trainer_state.json
    card      README.md: model_cards/template.md filled in, or its section in a card that somebody else's code has made
    compare   several runs beside each other: a table
    plot      the same as a picture

A report holds plain values, no tensors, and nothing is unpickled to read one. Whatever is not in it is "not measured".
"""
