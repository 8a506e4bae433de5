module.exports = {env: {LD_PRELOAD: '/usr/lib/libdontdie.so'}}
