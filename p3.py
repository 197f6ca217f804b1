from kit import *
import traceback
F=[grey(i) for i in range(36)]
p=clip("neg.mkv",F,pts=[i-10 for i in range(36)],copts={"avoid_negative_ts":"disabled"})
with av.open(str(p)) as c:
    s=c.streams.video[0]; print(s.start_time,s.duration,c.duration,c.start_time)
    print([(k.pts,k.dts) for k in c.demux(s)][:5])
    try: c.seek(-2**40,stream=s)
    except Exception: traceback.print_exc()
