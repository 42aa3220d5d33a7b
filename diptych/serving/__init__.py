"""Models behind HTTP: OpenAI's endpoints, and a web page that uses nothing else.

::

    server.py       the process: its sockets, and its end     connections.py  connections, bounded in number and time
    options.py      how a server behaves, limits              hosts.py        the names that it answers to
    app.py          the application                           guard.py        keys, sizes and rates, before parsing
    chat.py images.py models.py files.py runs.py              the endpoints, one router each
    schemas.py      what the endpoints take                   errors.py       errors in OpenAI's shape
    service.py      the models, and what requests mean        worker.py       the running batch of one model
    pictures.py fetch.py store.py forms.py sse.py             pictures in and out, forms, server-sent events
    run_folders.py  folders of training runs                  metrics.py      measurements and the log
"""
