"""The HTTP/2 front, on the ``h2`` library: RFC 9113, beside the HTTP/1.1 one and with the same interfaces.

::

    choice      which of the two protocols a new connection speaks
    connection  one connection: what comes in
    ending      how it ends
    sending     whose turn it is to send
    stream      one request, and the way to answer it: what the application gets
    receiving   its receiving half
    outbox      what it still has to send
    engine      h2, and what is kept from it
    frames      frames cut out of what was received; what is wrong with them before anyone looks inside
    heads       fields -> our verdict on a request, and back: pure
    limits      what a client may ask of one connection

h2 holds the state of the connection and of its streams, the windows, and HPACK. It treats as errors of the whole
connection what RFC 9113 calls errors of one stream, and cannot end a connection while streams live on. So it is
given one frame at a time and none of the fields, and it neither sends nor receives GOAWAY.
"""
