"""Report of a run, of its settings, memory, loss and speed: written while it trains, shown as a card, compared.

    facts       what is said of a run before it starts: settings, model, data, versions, device
    record      the run's report as it grows: memory, loss and speed of each training, also over resumptions
    history     losses and speed, from the rows that a trainer has logged
    parts       what is measured of a run's memory: labels, colours
    report      lowmem_report.json: written atomically, read with care; or made from a trainer_state.json
    foreign     sizes of a run without a report, from its files
    mended      TRL's card, where it would say what is not so
    card        README.md: model_cards/template.md filled in, or its section in a card that somebody else's code made
    compare     several runs beside each other: a table
    plot        the same as a picture
    callback    what a run keeps in memory, counted while it trains
    said        what a run prints at its start and its end
    skips       updates that were left out: in the log, in warnings, and the end of the run
    model_card  the card that a trainer writes

A report holds plain values, no tensors, and nothing is unpickled to read one. Whatever is not in it is "not measured".
"""
