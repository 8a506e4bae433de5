export LD_PRELOAD=libdontdie.so
